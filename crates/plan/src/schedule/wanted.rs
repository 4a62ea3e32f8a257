//! The tensors of the result, in order: as stored, made by operations, or put together from parts of both.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::assembled::assembled;
use super::select::selected;
use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::device_map::{DeviceMap, DeviceMapError, NAMES_TOLD_MAX};
use crate::dims::{Dims, row_major};
use crate::dtype::{Dtype, numel};
use crate::machine::Machine;
use crate::placement::DeviceId;
use crate::plan::PlanError;
use crate::quant::{Group, Recipe, Role};
use crate::request::{Dequantize, External, Layout, Request};
use crate::slice::{Pieces, Slice, SliceError};

/// A tensor of the result.
pub(super) struct Wanted<'r> {
    /// The stored tensor, the payload of the group, or the first of what it is put together from: what orders the result of a device.
    pub(super) stored: TensorRef<'r>,
    /// Where it goes.
    pub(super) device: DeviceId,
    /// Its name, where that is neither the stored tensor's nor the group's.
    pub(super) name: Option<&'r str>,
    pub(super) what: What<'r>,
    /// Memory of the caller's own that it lands in.
    pub(super) external: Option<&'r External>,
    /// The same tensor on another device, which it is copied from, by its place in the list.
    pub(super) copy_of: Option<u32>,
}

/// How a tensor of the result comes to be.
#[derive(Clone)]
pub(super) enum What<'r> {
    /// Whole, as stored.
    Stored,
    /// By an operation on several stored ones.
    Made(Making<'r>),
    /// From parts.
    Parts(Box<Parts<'r>>),
}

/// What a tensor of the result is put together from.
#[derive(Clone)]
pub(super) struct Parts<'r> {
    pub(super) dtype: Dtype,
    pub(super) shape: Cow<'r, [u64]>,
    pub(super) len_bytes: u64,
    /// Bytes from its first to its last, which are more than its own where the caller's memory has gaps.
    pub(super) span_bytes: u64,
    /// What arrives as stored.
    pub(super) stored: SmallVec<[StoredPart<'r>; 1]>,
    /// What operations make.
    pub(super) made: Vec<Making<'r>>,
}

/// A part that arrives as stored.
#[derive(Clone)]
pub(super) struct StoredPart<'r> {
    pub(super) id: TensorId,
    pub(super) slice: &'r Slice,
    /// Index of its first element in the tensor; empty for the very first.
    pub(super) at: &'r [u64],
    pub(super) pieces: Pieces,
}

/// A quantized tensor, or a part of one, that an operation makes.
#[derive(Clone)]
pub(super) struct Making<'r> {
    pub(super) group: &'r Group,
    /// The part; `None`: all of it.
    pub(super) cut: Option<Arc<Cut>>,
    /// Where it begins in its tensor.
    pub(super) offset_bytes: u64,
    /// Whether the result is `[.., K, N]`.
    pub(super) is_transposed: bool,
}

/// A part of a quantized tensor: the parts of its members, and how to make it from them. Groups that are cut alike share it.
pub(super) struct Cut {
    pub(super) shape: Dims,
    pub(super) recipe: Arc<Recipe>,
    /// By their places among the group's members; `None`: the whole member.
    pub(super) members: Vec<(usize, Option<Pieces>)>,
}

impl<'r> Wanted<'r> {
    pub(super) fn stored(stored: TensorRef<'r>, device: DeviceId) -> Wanted<'r> {
        Wanted { stored, device, name: None, what: What::Stored, external: None, copy_of: None }
    }

    pub(super) fn made(
        checkpoint: &'r Checkpoint,
        group: &'r Group,
        dequantize: &Dequantize,
        device: DeviceId,
    ) -> Wanted<'r> {
        let making = Making::alone(group, None, dequantize);
        let stored = Wanted::stored(checkpoint.tensor(group.payload()), device);
        Wanted { what: What::Made(making), ..stored }.named(&group.name)
    }

    pub(super) fn named(mut self, name: &'r str) -> Wanted<'r> {
        self.name = (name != self.stored.info.name).then_some(name);
        self
    }

    pub(super) fn name(&self) -> &'r str {
        self.name.unwrap_or(self.stored.info.name)
    }

    pub(super) fn dtype(&self, request: &Request) -> Dtype {
        match (&self.what, &request.dequantize) {
            (What::Parts(parts), _) => parts.dtype,
            (What::Made(_), Some(dequantize)) => dequantize.dtype,
            _ => self.stored.info.dtype,
        }
    }

    /// Returns its shape where that is not the stored tensor's.
    pub(super) fn own_shape(&self) -> Option<Cow<'_, [u64]>> {
        match &self.what {
            What::Parts(parts) => Some(Cow::Borrowed(&parts.shape)),
            What::Made(making) => Some(making.shape()),
            What::Stored => None,
        }
    }

    /// Returns the bytes it takes in the result.
    pub(super) fn len_bytes(&self, request: &Request) -> u64 {
        match (&self.what, &request.dequantize) {
            (What::Parts(parts), _) => parts.len_bytes,
            (What::Made(making), Some(dequantize)) => making.len_bytes(dequantize),
            _ => self.stored.info.len_bytes(),
        }
    }

    /// Returns the bytes from its first to its last.
    pub(super) fn span_bytes(&self, request: &Request) -> u64 {
        match &self.what {
            What::Parts(parts) => parts.span_bytes,
            _ => self.len_bytes(request),
        }
    }

    /// Returns the bytes of a file that it is, if it is one run of them.
    pub(super) fn run(&self) -> Option<(u32, u64, u64)> {
        let stored = &self.stored;
        let run = match &self.what {
            What::Stored => 0..stored.info.len_bytes(),
            What::Made(_) => return None,
            What::Parts(parts) => match (&*parts.stored, &*parts.made) {
                ([part], []) if part.pieces.len_bytes() == parts.len_bytes => part.pieces.run()?,
                _ => return None,
            },
        };
        Some((stored.file, stored.file_offset_bytes + run.start, stored.file_offset_bytes + run.end))
    }

    /// Returns the parts that arrive as stored.
    pub(super) fn parts(&self) -> &[StoredPart<'r>] {
        match &self.what {
            _ if self.copy_of.is_some() => &[],
            What::Parts(parts) => &parts.stored,
            What::Stored | What::Made(_) => &[],
        }
    }

    /// Returns what operations make of it.
    pub(super) fn makings(&self) -> &[Making<'r>] {
        match &self.what {
            _ if self.copy_of.is_some() => &[],
            What::Made(making) => std::slice::from_ref(making),
            What::Parts(parts) => &parts.made,
            What::Stored => &[],
        }
    }
}

impl<'r> Making<'r> {
    /// Makes a tensor of its own, in the layout asked for.
    pub(super) fn alone(group: &'r Group, cut: Option<Arc<Cut>>, dequantize: &Dequantize) -> Making<'r> {
        let is_transposed = match dequantize.layout {
            Layout::Rows => false,
            Layout::AsStored => group.recipe.is_column_major,
            Layout::Plain => group.is_plain_transposed,
        };
        Making { group, cut, offset_bytes: 0, is_transposed }
    }

    /// Makes a part of a tensor, whose rows lie among those of others.
    pub(super) fn part(group: &'r Group, cut: Option<Arc<Cut>>, offset_bytes: u64) -> Making<'r> {
        Making { group, cut, offset_bytes, is_transposed: false }
    }

    /// Returns the bytes of what is made. Recognition has checked that the product fits.
    pub(super) fn len_bytes(&self, dequantize: &Dequantize) -> u64 {
        self.rows_shape().iter().product::<u64>() * (dequantize.dtype.bits() / 8)
    }

    /// Returns how the bytes become numbers.
    pub(super) fn recipe(&self) -> &Arc<Recipe> {
        self.cut.as_ref().map_or(&self.group.recipe, |cut| &cut.recipe)
    }

    /// Returns the shape of what is made as `[.., N, K]`.
    fn rows_shape(&self) -> &[u64] {
        self.cut.as_ref().map_or(&self.group.shape, |cut| &cut.shape)
    }

    /// Returns the shape of what is made.
    pub(super) fn shape(&self) -> Cow<'_, [u64]> {
        let mut shape = Cow::Borrowed(self.rows_shape());
        if self.is_transposed
            && let [.., rows, cols] = shape.to_mut().as_mut_slice()
        {
            std::mem::swap(rows, cols);
        }
        shape
    }

    /// Walks the tensors that making it uses up, whole or in part.
    pub(super) fn sources(
        &self,
        dequantize: &Dequantize,
    ) -> impl Iterator<Item = (Role, TensorId, Option<&Pieces>)> {
        let fold = dequantize.fold;
        let is_used = move |role: Role| role != Role::Description && (fold || role != Role::Fold);
        let members = &self.group.members;
        let whole = if self.cut.is_some() { &[][..] } else { members };
        let cut = self.cut.iter().flat_map(|cut| &cut.members);
        let cut = cut.map(|(place, pieces)| (members[*place].0, members[*place].1, pieces.as_ref()));
        let sources = whole.iter().map(|(role, id)| (*role, *id, None)).chain(cut);
        sources.filter(move |(role, ..)| is_used(*role))
    }
}

/// Returns the tensors that making a group uses up: all but a factor that is not to be folded in.
pub(super) fn members<'g>(
    group: &'g Group,
    dequantize: &Dequantize,
) -> impl Iterator<Item = (Role, TensorId)> + use<'g> {
    let fold = dequantize.fold;
    group.members.iter().copied().filter(move |(role, _)| fold || *role != Role::Fold)
}

/// Finds what the request asks for: by device, and in the order of the checkpoint's table on each.
pub(super) fn wanted<'r>(
    checkpoint: &'r Checkpoint,
    request: &'r Request,
    machine: &Machine,
) -> Result<Vec<Wanted<'r>>, PlanError> {
    let mut wanted = match &request.assembly {
        Some(assembly) => assembled(checkpoint, request, assembly)?,
        None => {
            let mut wanted = selected(checkpoint, request)?;
            cut_out(checkpoint, request, &mut wanted)?;
            wanted
        }
    };
    if let Some(map) = &request.device_map {
        wanted = spread(map, machine, wanted)?;
    } else if request.assembly.is_some() {
        wanted.sort_by_key(|wanted| (wanted.device, wanted.stored.id));
    }
    give_memory(checkpoint, request, &mut wanted)?;
    Ok(wanted)
}

/// Leaves of tensors the parts asked for.
fn cut_out<'r>(
    checkpoint: &'r Checkpoint,
    request: &'r Request,
    wanted: &mut [Wanted<'r>],
) -> Result<(), PlanError> {
    if request.slices.is_empty() {
        return Ok(());
    }
    let by_name = by_name(wanted);
    for (name, slice) in &request.slices {
        let Some(index) = by_name.get(name.as_str()) else {
            return Err(not_selected(checkpoint, name, |name| PlanError::SliceNotSelected { name }));
        };
        let wanted = &mut wanted[index[0]];
        let parts = match &wanted.what {
            What::Made(making) => made_part(checkpoint, request, making.group, slice)?,
            _ => stored_part(wanted.stored, slice)
                .map_err(|source| PlanError::Slice { name: name.clone(), source })?,
        };
        wanted.what = What::Parts(Box::new(parts));
    }
    Ok(())
}

fn stored_part<'r>(stored: TensorRef<'_>, slice: &'r Slice) -> Result<Parts<'r>, SliceError> {
    let info = stored.info;
    let pieces = slice.pieces(info.dtype, info.shape)?;
    let len_bytes = pieces.len_bytes();
    Ok(Parts {
        dtype: info.dtype,
        shape: Cow::Owned(slice.shape(info.shape)?.into_vec()),
        len_bytes,
        span_bytes: len_bytes,
        stored: smallvec![StoredPart { id: stored.id, slice, at: &[], pieces }],
        made: Vec::new(),
    })
}

fn made_part<'r>(
    checkpoint: &Checkpoint,
    request: &Request,
    group: &'r Group,
    slice: &Slice,
) -> Result<Parts<'r>, PlanError> {
    let dequantize = request.dequantize.as_ref().expect("something is made only of what is dequantized");
    let making = Making::alone(group, cut(checkpoint, group, slice)?, dequantize);
    let len_bytes = making.len_bytes(dequantize);
    Ok(Parts {
        dtype: dequantize.dtype,
        shape: Cow::Owned(making.shape().into_owned()),
        len_bytes,
        span_bytes: len_bytes,
        stored: SmallVec::new(),
        made: vec![making],
    })
}

/// Works out which parts of a group's members a part of its result needs.
pub(super) fn cut(
    checkpoint: &Checkpoint,
    group: &Group,
    slice: &Slice,
) -> Result<Option<Arc<Cut>>, PlanError> {
    let name = || group.name.clone();
    let shape = slice.shape(&group.shape).map_err(|source| PlanError::Slice { name: name(), source })?;
    if *shape == *group.shape {
        return Ok(None);
    }
    if slice.ranges().iter().any(|range| range.step != 1) {
        return Err(PlanError::SliceOfMade { name: name() });
    }
    let ranges: Vec<_> = slice.ranges().iter().map(|range| range.start..range.stop).collect();
    let impossible = |source| PlanError::Cut { name: name(), source: Box::new(source) };
    let window = group.window(&ranges).map_err(impossible)?;
    let cut = group.cut(checkpoint, &window).map_err(impossible)?;
    let members = cut.members.into_iter().map(|member| {
        let pieces = member.pieces().map_err(|source| PlanError::Slice { name: name(), source })?;
        let whole = 0..checkpoint.tensor(member.tensor).info.len_bytes();
        let is_part = pieces.run() != Some(whole);
        let place = group.members.iter().position(|own| *own == (member.role, member.tensor));
        Ok((place.expect("what is cut is a member"), is_part.then_some(pieces)))
    });
    let members = members.collect::<Result<_, PlanError>>()?;
    Ok(Some(Arc::new(Cut { shape, recipe: cut.recipe.into(), members })))
}

/// Puts every tensor on the devices that the map names, once on each. What another device can be copied from is not read again.
fn spread<'r>(
    map: &DeviceMap,
    machine: &Machine,
    wanted: Vec<Wanted<'r>>,
) -> Result<Vec<Wanted<'r>>, PlanError> {
    // Each with the number of the tensor it is, and whether it is copied from the first of its devices.
    let mut spread: Vec<(Wanted<'r>, usize, Option<DeviceId>)> = Vec::with_capacity(wanted.len());
    let (mut nowhere, mut nowhere_count) = (Vec::new(), 0);
    for (number, wanted) in wanted.into_iter().enumerate() {
        let name = wanted.name();
        let Some([first, others @ ..]) = map.devices_of(name) else {
            nowhere_count += 1;
            if nowhere.len() < NAMES_TOLD_MAX {
                nowhere.push(name.to_owned());
            }
            continue;
        };
        for other in others {
            let source = machine.peers.contains(&(*first, *other)).then_some(*first);
            let (name, what) = (wanted.name, wanted.what.clone());
            spread.push((Wanted { name, what, ..Wanted::stored(wanted.stored, *other) }, number, source));
        }
        spread.push((Wanted { device: *first, ..wanted }, number, None));
    }
    if !nowhere.is_empty() {
        let missing = DeviceMapError::NotMapped { names: nowhere, count: nowhere_count };
        return Err(PlanError::DeviceMap(missing));
    }
    spread.sort_by_key(|(wanted, ..)| (wanted.device, wanted.stored.id));
    let places: HashMap<(usize, DeviceId), u32> =
        (0..).zip(&spread).map(|(place, (wanted, number, _))| ((*number, wanted.device), place)).collect();
    let copied = |(wanted, number, source): (Wanted<'r>, usize, Option<DeviceId>)| Wanted {
        copy_of: source.map(|source| places[&(number, source)]),
        ..wanted
    };
    Ok(spread.into_iter().map(copied).collect())
}

/// Notes the caller's own memory.
fn give_memory<'r>(
    checkpoint: &'r Checkpoint,
    request: &'r Request,
    wanted: &mut [Wanted<'r>],
) -> Result<(), PlanError> {
    if request.external.is_empty() {
        return Ok(());
    }
    let by_name = by_name(wanted);
    for external in &request.external {
        let places = by_name.get(external.name.as_str()).map_or(&[][..], Vec::as_slice);
        let is_there = |place: &&usize| wanted[**place].device == external.device;
        let Some(place) = places.iter().find(is_there).or(places.first()) else {
            return Err(not_selected(checkpoint, &external.name, |name| PlanError::ExternalNotSelected {
                name,
            }));
        };
        let wanted = &mut wanted[*place];
        wanted.external = Some(external);
        if let Some(strides) = &external.strides {
            stretch(checkpoint, request, wanted, strides)?;
        }
    }
    Ok(())
}

/// Lays a tensor out with the strides of the caller's memory.
fn stretch<'r>(
    checkpoint: &'r Checkpoint,
    request: &'r Request,
    wanted: &mut Wanted<'r>,
    strides: &[u64],
) -> Result<(), PlanError> {
    let shape = wanted.own_shape().unwrap_or(Cow::Borrowed(wanted.stored.info.shape)).into_owned();
    let name = wanted.name().to_owned();
    let bad = || {
        let (name, shape, strides) = (name.clone(), shape.clone(), strides.to_vec());
        PlanError::BadStrides { name, shape, strides }
    };
    if strides.len() != shape.len() {
        return Err(bad());
    }
    let natural = row_major(&shape);
    let is_natural = |dim: usize| shape[dim] <= 1 || strides[dim] == natural[dim];
    if numel(&shape) == Some(0) || (0..shape.len()).all(is_natural) {
        return Ok(());
    }
    if !wanted.makings().is_empty() {
        return Err(PlanError::StridesOfMade { name });
    }
    let dtype = wanted.dtype(request);
    let len_bytes = wanted.len_bytes(request);
    let span_bytes = reach(&shape, strides).and_then(|reach| dtype.len_bytes(reach)).ok_or_else(bad)?;
    let mut stored = match std::mem::replace(&mut wanted.what, What::Stored) {
        What::Parts(parts) => parts.stored,
        What::Stored | What::Made(_) => {
            let id = wanted.stored.id;
            smallvec![StoredPart { id, slice: &WHOLE, at: &[], pieces: Pieces::default() }]
        }
    };
    for StoredPart { id, slice, at, pieces } in &mut stored {
        let whole = checkpoint.tensor(*id).info;
        let first = at.iter().zip(strides).map(|(at, stride)| at * stride).sum();
        let inner = &strides[strides.len() - whole.shape.len()..];
        let stretched = slice.pieces_into(whole.dtype, whole.shape, inner, first);
        *pieces = stretched.map_err(|source| PlanError::Slice { name: name.clone(), source })?;
    }
    let shape = Cow::Owned(shape);
    let parts = Parts { dtype, shape, len_bytes, span_bytes, stored, made: Vec::new() };
    wanted.what = What::Parts(Box::new(parts));
    Ok(())
}

/// Returns the elements from the first to the last of a tensor with these strides; `None` where two of its elements would lie in the
/// same place, or its end is out of reach.
fn reach(shape: &[u64], strides: &[u64]) -> Option<u64> {
    let mut dims: Vec<_> = (0..shape.len()).filter(|dim| shape[*dim] > 1).collect();
    dims.sort_by_key(|dim| strides[*dim]);
    dims.into_iter().try_fold(1u64, |reach, dim| {
        let is_apart = strides[dim] >= reach;
        is_apart.then(|| strides[dim].checked_mul(shape[dim] - 1)?.checked_add(reach)).flatten()
    })
}

static WHOLE: Slice = Slice::whole();

/// Finds tensors of the result by their names: more than one place where several devices have it.
fn by_name<'r>(wanted: &[Wanted<'r>]) -> HashMap<&'r str, Vec<usize>> {
    let mut by_name: HashMap<&str, Vec<usize>> = HashMap::with_capacity(wanted.len());
    for (place, wanted) in wanted.iter().enumerate() {
        by_name.entry(wanted.name()).or_default().push(place);
    }
    by_name
}

/// Says of a name whether it is unknown or only not selected.
fn not_selected(checkpoint: &Checkpoint, name: &str, error: impl FnOnce(String) -> PlanError) -> PlanError {
    match checkpoint.find(name) {
        Some(_) => error(name.to_owned()),
        None => PlanError::UnknownTensor { name: name.to_owned(), tensor_count: checkpoint.len() },
    }
}
