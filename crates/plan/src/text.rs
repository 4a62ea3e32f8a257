//! A plan as text for people and as JSON for scripts.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use serde::ser::{SerializeSeq, SerializeStruct};
use serde::{Serialize, Serializer};

use crate::dtype::Dtype;
use crate::extent::Stride;
use crate::placement::Arena;
use crate::plan::{Copy, OverRead, Plan, Read, Steps, Target};

impl fmt::Display for Plan {
    /// Prints every file, arena, read and tensor, a line each, and what passes the bound on reading. Offsets and lengths are bytes; a tensor
    /// is `name dtype [shape]  file+offset  len -> arena+offset`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let promised = self.promised();
        writeln!(f, "tensors        {:>16}", self.tensors().len())?;
        writeln!(f, "payload        {:>16} bytes", promised.payload_bytes)?;
        writeln!(f, "needed         {:>16} bytes", promised.needed_bytes)?;
        writeln!(f, "read           {:>16} bytes in {} reads", promised.read_bytes, promised.reads)?;
        writeln!(f, "alignment      {:>16} bytes", promised.alignment_bytes)?;
        writeln!(f, "in place       {:>16} bytes", promised.in_place_bytes)?;
        writeln!(f, "copies         {:>16}", promised.copies)?;
        if promised.operations > 0 {
            writeln!(f, "operations     {:>16}", promised.operations)?;
            writeln!(f, "transient      {:>16} bytes", promised.transient_bytes)?;
        }
        writeln!(f, "result memory  {:>16} bytes", promised.target_bytes)?;
        writeln!(f, "peak staging   {:>16} bytes", promised.peak_staging_bytes)?;
        writeln!(f, "peak host      {:>16} bytes", promised.peak_host_bytes)?;
        writeln!(f, "direct align   {:>16} bytes", self.machine().direct_align_bytes)?;
        self.unfused().iter().try_for_each(|unfused| writeln!(f, "not fused      {unfused}"))?;
        let unused = |rule: &String| writeln!(f, "not used       rule {rule:?}, which no tensor has");
        self.unused_rules().iter().try_for_each(unused)?;

        if !self.over_reads().is_empty() {
            writeln!(f, "\nread in vain beyond the bound")?;
        }
        for OverRead { name, over_bytes, reason } in self.over_reads() {
            writeln!(f, "  {name}  {over_bytes} bytes: {reason}")?;
        }
        writeln!(f, "\nfiles")?;
        for (number, file) in self.checkpoint().files().iter().enumerate() {
            writeln!(
                f,
                "  f{number}  {}  {} bytes, data from {}",
                file.name(),
                file.len_bytes(),
                file.header().data_start_bytes()
            )?;
        }
        writeln!(f, "\narenas")?;
        for (number, arena) in self.arenas().iter().enumerate() {
            let group = match (arena.group.as_str(), arena) {
                (group, Arena { is_external: true, .. }) => format!("{group} (the caller's own memory)"),
                (group, Arena { is_scratch: true, .. }) => format!("({group} of operations)"),
                ("", _) => "(rest)".to_owned(),
                (group, _) => group.to_owned(),
            };
            writeln!(f, "  a{number}  {}  {} bytes  {group}", arena.device, arena.len_bytes)?;
        }
        writeln!(f, "\nreads")?;
        for read in self.reads() {
            let extent = read.extent;
            write!(f, "  f{}+{}  {}", extent.file, extent.offset_bytes, extent.len_bytes)?;
            if let Some(Stride { piece_len_bytes, piece_count, stride_bytes }) = read.stride {
                write!(f, " in {piece_count} x {piece_len_bytes} every {stride_bytes}")?;
            }
            match &read.target {
                Target::InPlace(place) => {
                    write!(f, " -> a{}+{}", place.arena, place.offset_bytes)?;
                    after(f, read)?;
                }
                Target::Staged { .. } => {
                    write!(f, " -> staging")?;
                    after(f, read)?;
                    for copy in self.copies(read) {
                        let (place, Steps { count, source_stride_bytes, target_stride_bytes }) =
                            (copy.target, copy.steps);
                        write!(f, "    +{}  ", copy.source_offset_bytes)?;
                        if !copy.steps.is_once() {
                            write!(f, "{count} x ")?;
                        }
                        write!(f, "{} -> a{}+{}", copy.len_bytes, place.arena, place.offset_bytes)?;
                        if !copy.steps.is_once() {
                            write!(f, "  every {source_stride_bytes} -> every {target_stride_bytes}")?;
                        }
                        writeln!(f)?;
                    }
                }
            }
        }
        if !self.operations().is_empty() {
            writeln!(f, "\noperations")?;
        }
        for (number, operation) in self.operations().iter().enumerate() {
            let (family, place) = (operation.family, operation.place);
            write!(
                f,
                "  o{number}  {family} {} -> a{}+{} ",
                operation.name, place.arena, place.offset_bytes
            )?;
            for source in &operation.sources {
                let (role, place) = (source.role.name(), source.place);
                write!(f, " {role} {} a{}+{}", source.len_bytes, place.arena, place.offset_bytes)?;
            }
            writeln!(f)?;
        }
        writeln!(f, "\ntensors")?;
        let operations = self.operations_of_tensors();
        for (number, tensor) in self.tensors().iter().enumerate() {
            let stored = self.checkpoint().tensor(tensor.id);
            write!(f, "  {} {} {:?}", self.name(tensor), tensor.dtype, self.shape(tensor))?;
            if let Some(makers) = operations.get(&(number as u32)) {
                let place = tensor.place;
                makers.iter().try_for_each(|operation| write!(f, "  o{operation}"))?;
                writeln!(f, "  {} -> a{}+{}", tensor.len_bytes, place.arena, place.offset_bytes)?;
                continue;
            }
            if tensor.shape.is_some() {
                write!(f, " of {:?}", stored.info.shape)?;
            }
            let place = tensor.place;
            writeln!(
                f,
                "  f{}+{}  {} -> a{}+{}",
                stored.file, stored.file_offset_bytes, tensor.len_bytes, place.arena, place.offset_bytes
            )?;
        }
        Ok(())
    }
}

impl Plan {
    /// Returns the operations that make each tensor, by its place.
    fn operations_of_tensors(&self) -> HashMap<u32, Vec<u32>> {
        let mut of_tensors: HashMap<u32, Vec<u32>> = HashMap::new();
        for (number, operation) in self.operations().iter().enumerate() {
            of_tensors.entry(operation.tensor).or_default().push(number as u32);
        }
        of_tensors
    }
}

/// Prints the operations that a read waits for.
fn after(f: &mut fmt::Formatter<'_>, read: &Read) -> fmt::Result {
    match read.after.len() {
        0 => writeln!(f),
        1 => writeln!(f, " after o{}", read.after.start),
        _ => writeln!(f, " after o{}..o{}", read.after.start, read.after.end - 1),
    }
}

impl Serialize for Plan {
    /// Serializes `promised`, `over_reads`, `machine`, `files`, `arenas`, `operations`, `reads` and `tensors`; `unfused` where
    /// something was to be fused and is not, and `unused_rules` where no tensor has one of the caller's own; every number is bytes or an index into one of these lists.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let files = self.checkpoint().files().iter().map(|file| FileView {
            name: file.name(),
            len_bytes: file.len_bytes(),
            data_start_bytes: file.header().data_start_bytes(),
        });
        let more = usize::from(!self.unfused().is_empty()) + usize::from(!self.unused_rules().is_empty());
        let mut plan = serializer.serialize_struct("Plan", 8 + more)?;
        plan.serialize_field("promised", self.promised())?;
        plan.serialize_field("over_reads", self.over_reads())?;
        plan.serialize_field("machine", self.machine())?;
        plan.serialize_field("files", &files.collect::<Vec<_>>())?;
        plan.serialize_field("arenas", self.arenas())?;
        plan.serialize_field("operations", self.operations())?;
        plan.serialize_field("reads", &Reads(self))?;
        plan.serialize_field("tensors", &Tensors(self))?;
        match self.unfused() {
            [] => plan.skip_field("unfused")?,
            unfused => plan.serialize_field("unfused", unfused)?,
        }
        match self.unused_rules() {
            [] => plan.skip_field("unused_rules")?,
            unused => plan.serialize_field("unused_rules", unused)?,
        }
        plan.end()
    }
}

#[derive(Serialize)]
struct FileView<'p> {
    name: &'p str,
    len_bytes: u64,
    data_start_bytes: u64,
}

struct Reads<'p>(&'p Plan);

impl Serialize for Reads<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct View<'p> {
            file: u32,
            offset_bytes: u64,
            len_bytes: u64,
            #[serde(skip_serializing_if = "Option::is_none")]
            stride: Option<Stride>,
            #[serde(skip_serializing_if = "Option::is_none")]
            in_place: Option<crate::Place>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            copies: &'p [Copy],
            #[serde(skip_serializing_if = "Range::is_empty")]
            after: Range<u32>,
        }
        let mut list = serializer.serialize_seq(Some(self.0.reads().len()))?;
        for read in self.0.reads() {
            let in_place = match &read.target {
                Target::InPlace(place) => Some(*place),
                Target::Staged { .. } => None,
            };
            let (extent, copies) = (read.extent, self.0.copies(read));
            list.serialize_element(&View {
                file: extent.file,
                offset_bytes: extent.offset_bytes,
                len_bytes: extent.len_bytes,
                stride: read.stride,
                in_place,
                copies,
                after: read.after.clone(),
            })?;
        }
        list.end()
    }
}

struct Tensors<'p>(&'p Plan);

#[derive(Serialize)]
struct TensorView<'p> {
    name: &'p str,
    dtype: Dtype,
    shape: &'p [u64],
    file: u32,
    offset_bytes: u64,
    len_bytes: u64,
    place: crate::Place,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    operations: &'p [u32],
}

impl Serialize for Tensors<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let plan = self.0;
        let operations = plan.operations_of_tensors();
        let mut list = serializer.serialize_seq(Some(plan.tensors().len()))?;
        for (number, tensor) in plan.tensors().iter().enumerate() {
            let stored = plan.checkpoint().tensor(tensor.id);
            list.serialize_element(&TensorView {
                name: plan.name(tensor),
                dtype: tensor.dtype,
                shape: plan.shape(tensor),
                file: stored.file,
                offset_bytes: stored.file_offset_bytes,
                len_bytes: tensor.len_bytes,
                place: tensor.place,
                operations: operations.get(&(number as u32)).map_or(&[], Vec::as_slice),
            })?;
        }
        list.end()
    }
}

impl Serialize for Dtype {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
