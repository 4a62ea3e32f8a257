//! What the kernels of dequantization are given: the structs of `kernels/dequantize_params.h`, field by field, filled
//! from a recipe.

use std::mem::offset_of;

use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{Codes, Element, Grid, Number, Recipe, Role, ZeroOffset, ZeroPoint};

use super::params::dtype_code;
use crate::dequantize::Layout;
use crate::operation::{Dequantize, Source};

/// A number to divide by, without dividing: the quotient of any `x` below 2^63 is `(2 * x * factor >> 64) >> shift`.
///
/// # Source
/// T. Granlund, P. Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994, theorem 4.2.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Divisor {
    pub(super) divisor: u64,
    factor: u64,
    shift: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Divisor>() == 24 && offset_of!(Divisor, shift) == 16);

impl Divisor {
    /// Takes numbers from 1 to 2^63; a 0, by which nothing is ever divided, is taken for a 1.
    pub(super) fn new(divisor: u64) -> Divisor {
        let divisor = divisor.max(1);
        let shift = divisor.next_power_of_two().ilog2();
        // At most 2^63 for powers of two. Others exceed 2^(shift - 1), which leaves less than 2^64.
        let factor = (1u128 << (63 + shift)).div_ceil(divisor.into()) as u64;
        Divisor { divisor, factor, shift, reserved: 0 }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CodesParams {
    pub(super) address: u64,
    pub(super) batch_stride: u64,
    pub(super) stride: u64,
    unit: Divisor,
    kind: u32,
    bits: u32,
    unit_bits: u32,
    top_bit: u32,
    is_interleaved: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<CodesParams>() == 72 && offset_of!(CodesParams, kind) == 48);

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GridParams {
    address: u64,
    batch_stride: u64,
    row_stride: u64,
    col_stride: u64,
    rows_per_group: Divisor,
    cols_per_group: Divisor,
    row_first: u32,
    col_first: u32,
    number: u32,
    is_swizzled: u32,
}

const _: () = assert!(size_of::<GridParams>() == 96 && offset_of!(GridParams, row_first) == 80);

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DequantizeParams {
    pub(super) target: u64,
    rows: u64,
    cols: u64,
    pub(super) item_count: u64,
    inner: Divisor,
    outer: Divisor,
    pub(super) codes: CodesParams,
    zero_codes: CodesParams,
    zero_grid: GridParams,
    scale: GridParams,
    bias: GridParams,
    per_nested_scale: Divisor,
    group_index: u64,
    pub(super) table: u64,
    nested_table: u64,
    nested_scale: u64,
    global: u64,
    global_batch_stride: u64,
    fold: u64,
    group_count: u32,
    element: u32,
    zero: u32,
    zero_constant: i32,
    zero_offset: u32,
    is_zero_swapped: u32,
    is_zero_signed: u32,
    has_scale: u32,
    global_kind: u32,
    global_number: u32,
    fold_number: u32,
    has_factor: u32,
    factor: f32,
    nested_offset: f32,
    has_bias: u32,
    target_dtype: u32,
    is_transposed: u32,
    first_row: u32,
    first_col: u32,
    reserved: u32,
}

const _: () = assert!(
    size_of::<DequantizeParams>() == 672
        && offset_of!(DequantizeParams, codes) == 80
        && offset_of!(DequantizeParams, scale) == 320
        && offset_of!(DequantizeParams, group_index) == 536
        && offset_of!(DequantizeParams, group_count) == 592
);

impl DequantizeParams {
    /// Flattens a recipe that has numbers, with no items to count yet.
    ///
    /// # Panics
    /// When a tensor is missing, or shorter than the recipe needs: the caller broke the contract, and going on would read
    /// somebody else's memory.
    pub(super) fn new(operation: &Dequantize<'_>) -> DequantizeParams {
        let Dequantize { recipe, sources, target, output } = *operation;
        let is_float = matches!(output.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
        assert!(is_float, "{} is not written, F32, F16 and BF16 are", output.dtype);
        let address = |role| address(recipe, sources, role);
        let (zero, zero_constant, zero_offset) = zero_codes(recipe.zero_point);
        let (zero_codes, is_zero_swapped, is_zero_signed) = packed_zero_points(recipe, sources);
        let global = recipe.scale.and_then(|scale| scale.global);
        let nested = match recipe.scale.map(|scale| scale.grid.number) {
            Some(Number::Nested { per_scale, offset }) => (per_scale, offset),
            _ => (1, 0.0),
        };
        DequantizeParams {
            target: target.range(operation.target_len_bytes()),
            rows: recipe.rows,
            cols: recipe.cols,
            item_count: 0,
            inner: Divisor::new(1),
            outer: Divisor::new(1),
            codes: codes_params(recipe.codes, recipe, sources, Role::Payload, recipe.codes_size()),
            zero_codes,
            zero_grid: match &recipe.zero_point {
                ZeroPoint::Float(grid) => grid_params(grid, address(Role::ZeroPoint)),
                _ => NO_GRID,
            },
            scale: match &recipe.scale {
                Some(scale) if scale.grid.number == Number::SignedExponent => {
                    grid_params(&scale.grid, address(Role::Payload))
                }
                Some(scale) => grid_params(&scale.grid, address(Role::Scale)),
                None => NO_GRID,
            },
            bias: recipe.bias.as_ref().map_or(NO_GRID, |grid| grid_params(grid, address(Role::Bias))),
            per_nested_scale: Divisor::new(nested.0.into()),
            group_index: address(Role::GroupIndex),
            table: address(Role::Table),
            nested_table: address(Role::NestedTable),
            nested_scale: address(Role::NestedScale),
            global: address(Role::Global),
            global_batch_stride: global.map_or(0, |global| global.batch_stride),
            fold: address(Role::Fold),
            group_count: recipe.group_index.unwrap_or_default(),
            element: element_code(recipe.element),
            zero,
            zero_constant,
            zero_offset,
            is_zero_swapped,
            is_zero_signed,
            has_scale: recipe.scale.is_some().into(),
            global_kind: global.map_or(0, |global| 1 + u32::from(global.is_divisor)),
            global_number: global.map_or(0, |global| float_code(global.dtype)),
            fold_number: recipe.fold.map_or(0, float_code),
            has_factor: recipe.factor.is_some().into(),
            factor: recipe.factor.unwrap_or_default(),
            nested_offset: nested.1,
            has_bias: recipe.bias.is_some().into(),
            target_dtype: dtype_code(output.dtype),
            is_transposed: (output.layout == Layout::Columns).into(),
            first_row: recipe.first_row,
            first_col: recipe.first_col,
            reserved: 0,
        }
    }

    /// Says what threads or blocks count: in each of `batch` matrices `outer` rows of `inner` items.
    pub(super) fn count(&mut self, batch: u64, outer: u64, inner: u64) {
        self.item_count = batch * outer * inner;
        (self.outer, self.inner) = (Divisor::new(outer), Divisor::new(inner));
    }

    /// Returns the parameters as the driver takes them.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: without padding (the sum of the fields is the size), every byte of the value is initialized.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

/// The address of a tensor that the recipe reads, 0 for one that it does not.
fn address(recipe: &Recipe, sources: &[Source<'_>], role: Role) -> u64 {
    let Some(least_len_bytes) = recipe.source_len_bytes(role) else { return 0 };
    let source = source(sources, role);
    let len_bytes = source.len_bytes;
    assert!(
        len_bytes >= least_len_bytes,
        "{role:?} has {len_bytes} bytes, the recipe reads {least_len_bytes}"
    );
    source.start.range(len_bytes)
}

fn source<'a, 's>(sources: &'s [Source<'a>], role: Role) -> &'s Source<'a> {
    let source = sources.iter().find(|source| source.role == role);
    source.unwrap_or_else(|| panic!("{role:?} is missing, the recipe reads it"))
}

fn codes_params(
    codes: Codes,
    recipe: &Recipe,
    sources: &[Source<'_>],
    role: Role,
    (rows, cols): (u64, u64),
) -> CodesParams {
    let bits = u32::from(codes.bits());
    let (kind, stride, unit, unit_bits, is_interleaved) = match codes {
        Codes::Rows { row_stride_bytes, .. } => (0, row_stride_bytes, 1, 0, false),
        Codes::RowsHighFirst { row_stride_bytes } => (1, row_stride_bytes, 1, 0, false),
        Codes::RowsPadded { row_stride_bytes, .. } => (2, row_stride_bytes, u64::from(32 / bits), 0, false),
        Codes::RowsWithScales { row_stride_bytes } => (3, row_stride_bytes, 1, 0, false),
        Codes::Columns { .. } => (4, rows, 1, 0, false),
        Codes::ColumnPlanes { .. } => (5, rows, 1, 0, false),
        Codes::Words { words_per_row, is_interleaved } => (6, words_per_row, 1, 0, is_interleaved),
        Codes::RowPairs => (7, cols, 1, 0, false),
        Codes::RowChunks { unit_bytes, unit_rows, .. } => {
            (8, cols, unit_rows, 8 * u32::from(unit_bytes), false)
        }
        Codes::AwqFast => (9, cols, 1, 0, false),
        Codes::RowPlanes { row_stride_bytes, .. } => (10, row_stride_bytes, 1, 0, false),
        Codes::ColumnsPadded { .. } => (11, rows, u64::from(32 / bits), 0, false),
        codes => unreachable!("{codes:?} is not known here"),
    };
    CodesParams {
        address: address(recipe, sources, role),
        batch_stride: source(sources, role).len_bytes / recipe.batch,
        stride,
        unit: Divisor::new(unit),
        kind,
        bits,
        unit_bits,
        top_bit: (unit_bits / bits).saturating_sub(1) * bits,
        is_interleaved: is_interleaved.into(),
        reserved: 0,
    }
}

fn packed_zero_points(recipe: &Recipe, sources: &[Source<'_>]) -> (CodesParams, u32, u32) {
    let (ZeroPoint::Packed { codes, is_swapped, is_signed, .. }, Some(scale)) =
        (recipe.zero_point, &recipe.scale)
    else {
        return (NO_CODES, 0, 0);
    };
    let known = "a checked recipe's groups have rows and columns";
    let row_groups = recipe.row_group_count(&scale.grid).expect(known);
    let col_groups = recipe.col_group_count(&scale.grid).expect(known);
    let sizes = if is_swapped { (col_groups, row_groups) } else { (row_groups, col_groups) };
    (codes_params(codes, recipe, sources, Role::ZeroPoint, sizes), is_swapped.into(), is_signed.into())
}

/// Kind, constant, and kind of offset.
fn zero_codes(zero_point: ZeroPoint) -> (u32, i32, u32) {
    match zero_point {
        ZeroPoint::None => (0, 0, 0),
        ZeroPoint::Constant(constant) => (1, constant, 0),
        ZeroPoint::Packed { offset: ZeroOffset::Constant(constant), .. } => (2, constant, 0),
        ZeroPoint::Packed { offset: ZeroOffset::WordWise, .. } => (2, 0, 1),
        ZeroPoint::Packed { offset: ZeroOffset::Modular, .. } => (2, 0, 2),
        ZeroPoint::Float(_) => (3, 0, 0),
        zero_point => unreachable!("{zero_point:?} is not known here"),
    }
}

fn grid_params(grid: &Grid, address: u64) -> GridParams {
    GridParams {
        address,
        batch_stride: grid.batch_stride,
        row_stride: grid.row_stride,
        col_stride: grid.col_stride,
        rows_per_group: Divisor::new(grid.rows_per_group.into()),
        cols_per_group: Divisor::new(grid.cols_per_group.into()),
        row_first: grid.row_first,
        col_first: grid.col_first,
        number: match grid.number {
            Number::F32 => 0,
            Number::F16 => 1,
            Number::Bf16 => 2,
            Number::E8m0 => 3,
            Number::E4m3 => 4,
            Number::I8 => 5,
            Number::SignedExponent => 6,
            Number::Nested { .. } => 7,
            number => unreachable!("{number:?} is not known here"),
        },
        is_swizzled: grid.is_swizzled.into(),
    }
}

fn float_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        dtype => unreachable!("a checked recipe has no scales of {dtype}"),
    }
}

fn element_code(element: Element) -> u32 {
    match element {
        Element::Unsigned => 0,
        Element::Signed => 1,
        Element::E2m1 => 2,
        Element::E2m3 => 3,
        Element::E3m2 => 4,
        Element::E4m3 => 5,
        Element::E5m2 => 6,
        Element::E4m3Fnuz => 7,
        Element::E5m2Fnuz => 8,
        Element::E8m0 => 9,
        Element::Table => 10,
        element => unreachable!("{element:?} is not known here"),
    }
}

const NO_DIVISOR: Divisor = Divisor { divisor: 1, factor: 1 << 63, shift: 0, reserved: 0 };

const NO_CODES: CodesParams = CodesParams {
    address: 0,
    batch_stride: 0,
    stride: 0,
    unit: NO_DIVISOR,
    kind: 0,
    bits: 1,
    unit_bits: 0,
    top_bit: 0,
    is_interleaved: 0,
    reserved: 0,
};

const NO_GRID: GridParams = GridParams {
    address: 0,
    batch_stride: 0,
    row_stride: 0,
    col_stride: 0,
    rows_per_group: NO_DIVISOR,
    cols_per_group: NO_DIVISOR,
    row_first: 0,
    col_first: 0,
    number: 0,
    is_swizzled: 0,
};

#[cfg(test)]
mod tests {
    use super::*;

    /// What kernels do with it.
    fn quotient(value: u64, by: Divisor) -> u64 {
        ((u128::from(2 * value) * u128::from(by.factor)) >> 64) as u64 >> by.shift
    }

    #[test]
    fn divisors_divide_exactly_around_every_multiple() {
        let powers = (0..63).map(|power| 1u64 << power);
        let near = powers.clone().flat_map(|power| [power.saturating_sub(1), power, power + 1]);
        let divisors: Vec<u64> =
            near.chain([10, 100, 576, 11_008, 4_294_967_291]).filter(|d| *d > 0).collect();
        for &divisor in &divisors {
            let by = Divisor::new(divisor);
            for value in powers.clone().chain([(1 << 63) - 1, 0]) {
                for value in [value, value / divisor * divisor, (value / divisor * divisor).saturating_sub(1)]
                {
                    assert_eq!(quotient(value, by), value / divisor, "{value} / {divisor}");
                }
            }
        }
    }

    #[test]
    fn nothing_is_divided_by_one() {
        let (none, one) = (NO_DIVISOR, Divisor::new(1));
        assert_eq!((none.factor, none.shift), (one.factor, one.shift));
    }
}
