//! Parts of quantized tensors: which bytes of the stored tensors a part of the result needs.
//!
//! A part is a [`Window`] of the matrices that a group's recipe makes. [`Group::cut`] says which bytes become it and by which
//! [`Recipe`]: any window can be cut. Where it begins inside a packed word, a byte or a group, what covers it is taken, and the recipe
//! says how much of that comes first. [`Group::stored_slices`] cuts the packed tensors themselves, for who wants them as they
//! are: exactly, or not at all.

mod codes;
mod error;
mod grid;
mod lines;
mod reshape;
mod stored;
mod window;

pub use error::CutError;
pub use lines::CutMember;
pub use window::Window;

use std::ops::Range;

use self::codes::cut_codes;
use self::grid::{Cutter, Units};
use self::lines::Lines;
use super::{Codes, Global, Grid, Group, Number, Recipe, Role, Scale, ZeroPoint};
use crate::checkpoint::{Checkpoint, TensorId};

/// What becomes a part of a quantized tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct CutGroup {
    /// The part of each stored tensor that the recipe reads, in the order of the group's members. Tensors that only describe the group are
    /// left out.
    pub members: Vec<CutMember>,
    /// How these bytes, each member's back to back, become the window's numbers.
    pub recipe: Recipe,
}

impl Group {
    /// Says which bytes become a window of the result, and how.
    ///
    /// Cutting costs no precision and no copy: the numbers are those of the whole result, bit for bit. Cuts at multiples of what is packed
    /// together (8 codes of 4 bits in a word, blocks of 32 columns) read no byte twice, others read the word, byte or scale at the
    /// cut on both sides. Three layouts read more:
    ///
    /// - chunks of rows in one byte (HQQ below 8 bits), where rows of every chunk share bytes: all bytes unless the rows are of one chunk,
    /// - nested scales (bitsandbytes' double quantization): all columns of scales, and rows of them up to the nearest scale of scales,
    /// - columns with a group index: all scales, as indices are those of the whole tensor.
    ///
    /// # Errors
    /// [`CutError::OutOfRange`] when the window leaves the matrices; [`CutError::Layout`] when a member is not laid out as the
    /// recipe says, which no recognised group is.
    pub fn cut(&self, checkpoint: &Checkpoint, window: &Window) -> Result<CutGroup, CutError> {
        window.check(self)?;
        Cut::new(self, &self.recipe, &self.members, checkpoint, window).run()
    }
}

/// A cut under way.
struct Cut<'c> {
    group: &'c Group,
    recipe: &'c Recipe,
    sources: &'c [(Role, TensorId)],
    checkpoint: &'c Checkpoint,
    window: &'c Window,
    members: Vec<CutMember>,
}

impl<'c> Cut<'c> {
    fn new(
        group: &'c Group,
        recipe: &'c Recipe,
        sources: &'c [(Role, TensorId)],
        checkpoint: &'c Checkpoint,
        window: &'c Window,
    ) -> Cut<'c> {
        Cut { group, recipe, sources, checkpoint, window, members: Vec::with_capacity(sources.len()) }
    }

    fn run(mut self) -> Result<CutGroup, CutError> {
        let [batch, rows, cols] = self.window.shape();
        let mut recipe = Recipe { batch, rows, cols, ..self.recipe.clone() };
        if [batch, rows, cols].contains(&0) {
            self.nothing();
        } else {
            self.payload(&mut recipe)?;
            self.scale_and_zero_point(&mut recipe)?;
            if let Some(grid) = self.recipe.bias {
                recipe.bias = Some(self.grid(Role::Bias, grid, Units::ONE)?.0);
            }
            self.columns(Role::GroupIndex, self.recipe.group_index.map(|_| 4))?;
            self.columns(Role::Fold, self.recipe.fold.map(|dtype| dtype.bits() / 8))?;
            for role in [Role::Table, Role::NestedTable] {
                self.whole(role)?;
            }
        }
        let place = |member: &CutMember| self.sources.iter().position(|(_, id)| *id == member.tensor);
        self.members.sort_by_key(place);
        Ok(CutGroup { members: self.members, recipe })
    }

    /// Of a window without numbers nothing is read.
    fn nothing(&mut self) {
        for &(role, tensor) in self.sources {
            if self.recipe.source_len_bytes(role).is_some() {
                let len_bytes = self.checkpoint.tensor(tensor).info.len_bytes();
                self.members.push(Lines::nothing(len_bytes).member(role, tensor));
            }
        }
    }

    fn payload(&mut self, recipe: &mut Recipe) -> Result<(), CutError> {
        let (all, window) = (self.recipe, self.window);
        let first = [u64::from(all.first_row), u64::from(all.first_col)];
        let rows = window.rows.start + first[0]..window.rows.end + first[0];
        let cols = window.cols.start + first[1]..window.cols.end + first[1];
        let inline = all.scale.filter(|scale| scale.grid.number == Number::SignedExponent);
        let cut = self.member(Role::Payload, |len_bytes| {
            let cut = cut_codes(all.codes, all.codes_size(), &rows, &cols, len_bytes / all.batch)?;
            let lines = Lines::of(all.batch, &window.batch, cut.shape, cut.ranges, len_bytes)?;
            Some((lines, (cut.codes, cut.first_row, cut.first_col)))
        })?;
        let Some((codes, first_row, first_col)) = cut else { return Ok(()) };
        (recipe.codes, recipe.first_row, recipe.first_col) = (codes, first_row, first_col);
        if let (Some(scale), Codes::RowsWithScales { row_stride_bytes }) = (inline, codes) {
            // Scales lie among the codes: a block that is cut has its scale before the first code.
            let batch_stride = if recipe.batch > 1 { recipe.rows * row_stride_bytes } else { 0 };
            let grid =
                Grid { row_stride: row_stride_bytes, batch_stride, col_first: first_col, ..scale.grid };
            recipe.scale = Some(Scale { grid, ..scale });
        }
        Ok(())
    }

    fn scale_and_zero_point(&mut self, recipe: &mut Recipe) -> Result<(), CutError> {
        // Zero-points count groups as the scale does, so that both begin where the packing of zero-points allows.
        let units = Units::of(&self.recipe.zero_point);
        if let Some(scale) = self.recipe.scale {
            if scale.grid.number != Number::SignedExponent {
                let (grid, numbers) = self.grid(Role::Scale, scale.grid, units)?;
                self.nested_scales(grid.number, numbers)?;
                recipe.scale = Some(Scale { grid, ..scale });
            }
            if let Some(global) = scale.global {
                self.global(global)?;
            }
        }
        match self.recipe.zero_point {
            ZeroPoint::Float(grid) => {
                recipe.zero_point = ZeroPoint::Float(self.grid(Role::ZeroPoint, grid, Units::ONE)?.0);
            }
            ZeroPoint::Packed { codes, is_swapped, is_signed, offset } => {
                let codes = self.packed_zero_points(codes, is_swapped, units)?;
                recipe.zero_point = ZeroPoint::Packed { codes, is_swapped, is_signed, offset };
            }
            ZeroPoint::None | ZeroPoint::Constant(_) => {}
        }
        Ok(())
    }

    /// Takes part of a grid: the grid of the part, and the stretch of the tensor's numbers that it is.
    fn grid(&mut self, role: Role, grid: Grid, units: Units) -> Result<(Grid, Range<u64>), CutError> {
        let (recipe, window) = (self.recipe, self.window);
        let cut = self.member(role, |len_bytes| {
            let cut = Cutter { recipe, window, units, len_bytes }.grid(grid)?;
            Some((cut.lines, (cut.grid, cut.numbers)))
        })?;
        // A recipe without the tensor cannot be carried out; it stays as it is.
        Ok(cut.unwrap_or((grid, 0..0)))
    }

    fn nested_scales(&mut self, number: Number, numbers: Range<u64>) -> Result<(), CutError> {
        let Number::Nested { per_scale, .. } = number else { return Ok(()) };
        let per_scale = u64::from(per_scale);
        let bytes = numbers.start / per_scale * 4..numbers.end.div_ceil(per_scale) * 4;
        self.member(Role::NestedScale, |len_bytes| Some((Lines::stretch(bytes, len_bytes)?, ()))).map(|_| ())
    }

    fn packed_zero_points(
        &mut self,
        codes: Codes,
        is_swapped: bool,
        units: Units,
    ) -> Result<Codes, CutError> {
        let (recipe, window) = (self.recipe, self.window);
        let cut = self.member(Role::ZeroPoint, |len_bytes| {
            Cutter { recipe, window, units, len_bytes }.zero_points(codes, is_swapped)
        })?;
        Ok(cut.unwrap_or(codes))
    }

    fn global(&mut self, global: Global) -> Result<(), CutError> {
        let number_len_bytes = global.dtype.bits() / 8 * global.batch_stride;
        if number_len_bytes == 0 {
            return self.whole(Role::Global);
        }
        let batch = &self.window.batch;
        let bytes = batch.start * number_len_bytes..batch.end * number_len_bytes;
        self.member(Role::Global, |len_bytes| {
            // Behind the last matrix's number there need not be the distance to a next one.
            Some((Lines::stretch(bytes.start..bytes.end.min(len_bytes), len_bytes)?, ()))
        })
        .map(|_| ())
    }

    /// Takes the window's columns of a tensor of one number a column.
    fn columns(&mut self, role: Role, number_len_bytes: Option<u64>) -> Result<(), CutError> {
        let Some(number_len_bytes) = number_len_bytes else { return Ok(()) };
        let cols = &self.window.cols;
        let bytes = cols.start * number_len_bytes..cols.end * number_len_bytes;
        self.member(role, |len_bytes| Some((Lines::stretch(bytes, len_bytes)?, ()))).map(|_| ())
    }

    /// Takes all of a tensor, if the recipe reads it.
    fn whole(&mut self, role: Role) -> Result<(), CutError> {
        if self.recipe.source_len_bytes(role).is_none() {
            return Ok(());
        }
        self.member(role, |len_bytes| Some((Lines::stretch(0..len_bytes, len_bytes)?, ()))).map(|_| ())
    }

    /// Takes part of a member, as `part` says of a tensor of so many bytes; what it says besides is handed on.
    fn member<T>(
        &mut self,
        role: Role,
        part: impl FnOnce(u64) -> Option<(Lines, T)>,
    ) -> Result<Option<T>, CutError> {
        let Some(&(_, id)) = self.sources.iter().find(|(member, _)| *member == role) else { return Ok(None) };
        let tensor = self.checkpoint.tensor(id);
        let len_bytes = tensor.info.len_bytes();
        let least = self.recipe.source_len_bytes(role).unwrap_or(0);
        match part(len_bytes).filter(|_| len_bytes >= least) {
            Some((lines, more)) => {
                self.members.push(lines.member(role, id));
                Ok(Some(more))
            }
            None => Err(CutError::Layout {
                group: self.group.name.clone(),
                tensor: tensor.info.name.to_owned(),
                len_bytes,
                least_len_bytes: least,
            }),
        }
    }
}
