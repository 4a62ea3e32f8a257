//! Parts of packed tensors as they are stored, for ranks that unpack themselves.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::codes::{LinesAre, Packing};
use super::grid::{gcd, in_whole_words};
use super::reshape::reshaped;
use super::{Cut, CutError, CutMember, Window};
use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::quant::{Codes, Family, Grid, Group, Number, Recipe, Role, ZeroOffset, ZeroPoint};
use crate::slice::Slice;

impl Group {
    /// Returns the slice of each stored tensor that makes up a window of the result as it is stored: packed codes, scales and
    /// zero-points, for a rank that unpacks them itself. Each slice is of the tensor's own shape, in the order of the members.
    ///
    /// Nothing is covered: what a rank gets is its part, whose first code is the first of the first word and of the first
    /// group. Tensors that differ neither by row nor by column are whole, and so are those that describe the group: `weight_shape`, HQQ's
    /// `shape` and bitsandbytes' `quant_state` say the *unsharded* sizes. With a group index (GPTQ's act-order), a rank gets the index of its
    /// columns, which counts groups of the whole tensor, and so the scales and zero-points of all groups. Of a window without
    /// numbers, every tensor with dimensions is empty.
    ///
    /// # Errors
    /// As [`Group::cut`]; [`CutError::InsideUnit`] when a word, byte, block or group would be cut; [`CutError::NotASlice`] when
    /// the bytes are none of the stored shape: columns of bitsandbytes' flat codes, columns of scales in tiles.
    ///
    /// # Source
    /// vLLM 0.33.0, `model_executor/parameter.py` and the layers' `create_weights`, for the dimension that each tensor is cut in.
    pub fn stored_slices(
        &self,
        checkpoint: &Checkpoint,
        window: &Window,
    ) -> Result<Vec<(TensorId, Slice)>, CutError> {
        window.check(self)?;
        let (recipe, members) = self.with_unread(checkpoint);
        let stored = Stored { group: self, recipe: &recipe, members: &members, checkpoint, window };
        stored.check()?;
        let cut = Cut::new(self, &recipe, &members, checkpoint, window).run()?;
        let slice = |&(role, id): &(Role, TensorId)| {
            let slice = match cut.members.iter().find(|member| member.tensor == id) {
                Some(member) => stored.slice(member)?,
                None if role == Role::GroupIndex => Slice::rows(window.cols.clone()),
                None => Slice::new([]),
            };
            Ok((id, slice))
        };
        members.iter().map(slice).collect()
    }

    /// Tells whether the group's index, which has these bytes, names the groups in their order: what files without an act-order have, and many that
    /// say they have one.
    pub fn is_index_in_order(&self, bytes: &[u8]) -> bool {
        let Some(scale) = &self.recipe.scale else { return false };
        let (indices, rest) = bytes.as_chunks();
        let is_in_order = |(col, index): (u32, &[u8; 4])| {
            u32::from_le_bytes(*index) == col / scale.grid.cols_per_group.max(1)
        };
        rest.is_empty() && indices.len() as u64 == self.recipe.cols && (0..).zip(indices).all(is_in_order)
    }

    /// Returns the group as its recipe would be without an index, for one whose index is [in order](Group::is_index_in_order): columns are then
    /// cut with the scales of their own groups.
    pub fn without_index(&self) -> Group {
        let mut group = self.clone();
        Arc::make_mut(&mut group.recipe).group_index = None;
        for (role, _) in group.members.iter_mut().filter(|(role, _)| *role == Role::GroupIndex) {
            *role = Role::Description;
        }
        group
    }

    /// The recipe as if it read what GPTQ and compressed-tensors store besides: zero-points of symmetric codes, indices that are
    /// in order.
    fn with_unread(&self, checkpoint: &Checkpoint) -> (Cow<'_, Recipe>, Cow<'_, [(Role, TensorId)]>) {
        let (mut recipe, mut members) = (Cow::Borrowed(&*self.recipe), Cow::Borrowed(&self.members[..]));
        for (place, &(role, id)) in self.members.iter().enumerate() {
            if role != Role::Description {
                continue;
            }
            let tensor = checkpoint.tensor(id);
            let name = tensor.info.name;
            if name.ends_with("g_idx") {
                members.to_mut()[place].0 = Role::GroupIndex;
            } else if self.family == Family::Gptq && name.ends_with("qzeros") {
                members.to_mut()[place].0 = Role::ZeroPoint;
                recipe.to_mut().zero_point = gptq_zero_points(self.recipe.codes, &tensor);
            }
        }
        (recipe, members)
    }
}

/// GPTQ's `qzeros`, `[groups, words of rows]`.
fn gptq_zero_points(codes: Codes, zeros: &TensorRef<'_>) -> ZeroPoint {
    let bits = codes.bits();
    let row_stride_bytes = zeros.info.shape.last().map_or(0, |words| words * zeros.info.dtype.bits() / 8);
    let codes = match codes {
        Codes::ColumnPlanes { .. } if !matches!(bits, 2 | 4 | 8) => {
            Codes::RowPlanes { bits, row_stride_bytes }
        }
        _ => Codes::Rows { bits, row_stride_bytes },
    };
    ZeroPoint::Packed { codes, is_swapped: true, is_signed: false, offset: ZeroOffset::Constant(0) }
}

/// A cut of stored tensors under way.
struct Stored<'s> {
    group: &'s Group,
    recipe: &'s Recipe,
    members: &'s [(Role, TensorId)],
    checkpoint: &'s Checkpoint,
    window: &'s Window,
}

/// Rows or columns that a tensor packs or scales together.
struct Together {
    role: Role,
    along: Along,
    len: u64,
    what: &'static str,
}

/// Along which index.
#[derive(Clone, Copy, PartialEq)]
enum Along {
    Rows,
    Cols,
}

impl Stored<'_> {
    /// Refuses a window that begins or ends inside a word, a byte or a group.
    fn check(&self) -> Result<(), CutError> {
        let units = self.units();
        for unit in &units {
            let (dim, range, len) = match unit.along {
                Along::Rows => ("row", &self.window.rows, self.recipe.rows),
                Along::Cols => ("column", &self.window.cols, self.recipe.cols),
            };
            let is_cut = |at: &u64| *at < len && !at.is_multiple_of(unit.len);
            if let Some(at) = [range.start, range.end].into_iter().find(is_cut) {
                // What would work is whole for all of them.
                let along = units.iter().filter(|other| other.along == unit.along);
                let multiple =
                    along.fold(1u64, |all, other| (all / gcd(all, other.len)).saturating_mul(other.len));
                return Err(CutError::InsideUnit {
                    group: self.group.name.clone(),
                    tensor: self.name(unit.role),
                    dim,
                    at,
                    unit: unit.len,
                    what: unit.what,
                    multiple,
                    nearest: [
                        at / multiple * multiple,
                        (at / multiple + 1).saturating_mul(multiple).min(len),
                    ],
                });
            }
        }
        Ok(())
    }

    /// Returns everything that must stay together.
    fn units(&self) -> Vec<Together> {
        let recipe = self.recipe;
        let [rows, cols] = self.packed_units(recipe.codes, Role::Payload);
        // Every unit of chunks holds rows of the whole tensor.
        let rows = if matches!(recipe.codes, Codes::RowChunks { .. }) { recipe.rows } else { rows };
        let mut units = Vec::with_capacity(8);
        let mut add = |along, len| units.push(Together { role: Role::Payload, along, len, what: "packed" });
        add(Along::Rows, rows.max(1));
        add(Along::Cols, cols);
        if let Some(scale) = &recipe.scale {
            let is_inline = scale.grid.number == Number::SignedExponent;
            let role = if is_inline { Role::Payload } else { Role::Scale };
            self.add_grid(&mut units, role, &scale.grid);
        }
        if let Some(grid) = &recipe.bias {
            self.add_grid(&mut units, Role::Bias, grid);
        }
        match &recipe.zero_point {
            ZeroPoint::Float(grid) => self.add_grid(&mut units, Role::ZeroPoint, grid),
            ZeroPoint::Packed { codes, is_swapped, offset, .. } => {
                if let Some(scale) = &recipe.scale {
                    let [rows, cols] = self.packed_units(in_whole_words(*codes, *offset), Role::ZeroPoint);
                    let groups = if *is_swapped { [cols, rows] } else { [rows, cols] };
                    self.add_groups(&mut units, Role::ZeroPoint, &scale.grid, groups, "packed");
                }
            }
            ZeroPoint::None | ZeroPoint::Constant(_) => {}
        }
        units
    }

    fn add_grid(&self, units: &mut Vec<Together>, role: Role, grid: &Grid) {
        self.add_groups(units, role, grid, [1, 1], "scaled");
        if grid.is_swizzled {
            self.add_groups(units, role, grid, [128, 4], "packed");
        }
        if let Number::Nested { per_scale, .. } = grid.number {
            // Scales of scales go by the stretch of scales, which is whole rows of them.
            let per_scale = u64::from(per_scale).max(1);
            let rows = per_scale / gcd(per_scale, grid.row_stride.max(1));
            let is_matrix = grid.row_stride > 0 && grid.col_stride > 0;
            let groups = if is_matrix { [rows, 1] } else { [per_scale; 2] };
            self.add_groups(units, role, grid, groups, "scaled");
        }
    }

    /// Adds so many groups, which lie together.
    fn add_groups(
        &self,
        units: &mut Vec<Together>,
        role: Role,
        grid: &Grid,
        groups: [u64; 2],
        what: &'static str,
    ) {
        let recipe = self.recipe;
        let mut add = |along, per_group: u32, groups: u64| {
            let len = u64::from(per_group).saturating_mul(groups).max(1);
            units.push(Together { role, along, len, what });
        };
        if grid.row_stride > 0 && recipe.row_group_count(grid) > Some(1) {
            add(Along::Rows, grid.rows_per_group, groups[0]);
        }
        let is_by_cols = grid.col_stride > 0 && recipe.group_index.is_none();
        if is_by_cols && recipe.col_group_count(grid) > Some(1) {
            add(Along::Cols, grid.cols_per_group, groups[1]);
        }
    }

    /// Returns the rows and columns that are together in whole elements of the stored tensor.
    fn packed_units(&self, codes: Codes, role: Role) -> [u64; 2] {
        let packing = Packing::of(codes);
        let element_len_bytes = self.tensor(role).map_or(1, |tensor| tensor.info.dtype.bits().div_ceil(8));
        let whole = |takes: u64| element_len_bytes / gcd(element_len_bytes, takes);
        match packing.lines {
            LinesAre::Rows { .. } | LinesAre::Chunks { .. } => {
                [packing.rows.codes, packing.cols.codes * whole(packing.cols.takes)]
            }
            LinesAre::Columns { .. } => [packing.rows.codes * whole(packing.rows.takes), packing.cols.codes],
        }
    }

    /// Returns the part of a member as a slice of the shape that it is stored with.
    fn slice(&self, member: &CutMember) -> Result<Slice, CutError> {
        let info = self.checkpoint.tensor(member.tensor).info;
        if member.len_bytes() == info.len_bytes() || info.shape.is_empty() {
            return Ok(Slice::new([]));
        }
        if member.len_bytes() == 0 {
            return Ok(Slice::rows(0..0));
        }
        // Both shapes in bits, so that elements of 4 bits are none other.
        let bits = info.dtype.bits();
        let mut dims = info.shape.to_vec();
        if let Some(last) = dims.last_mut() {
            *last *= bits;
        }
        let [matrices, lines, bytes] = member.ranges();
        let from = [
            (member.shape[0], matrices),
            (member.shape[1], lines),
            (member.shape[2] * 8, bytes.start * 8..bytes.end * 8),
        ];
        let in_elements = |mut ranges: Vec<Range<u64>>| {
            let last = ranges.last_mut()?;
            let is_whole = last.start.is_multiple_of(bits) && last.end.is_multiple_of(bits);
            *last = last.start / bits..last.end / bits;
            is_whole.then_some(ranges)
        };
        let ranges = reshaped(from, &dims).and_then(in_elements);
        ranges.map(Slice::new).ok_or_else(|| CutError::NotASlice {
            group: self.group.name.clone(),
            tensor: info.name.to_owned(),
            shape: info.shape.to_vec(),
        })
    }

    fn tensor(&self, role: Role) -> Option<TensorRef<'_>> {
        let (_, id) = self.members.iter().find(|(member, _)| *member == role)?;
        Some(self.checkpoint.tensor(*id))
    }

    fn name(&self, role: Role) -> String {
        self.tensor(role).map_or_else(|| self.group.name.clone(), |tensor| tensor.info.name.to_owned())
    }
}
