//! Tensors of dtypes below 16 bits without scales: casts.

use crate::checkpoint::TensorRef;
use crate::dtype::Dtype;
use crate::quant::scene::{members, wrong_dtype, wrong_shape};
use crate::quant::{Codes, Element, Family, Group, QuantError, Recipe, Role};

/// Makes a group of the payload alone. Codes of 4 and 6 bits are a dense stream, the first in the lowest bits.
pub(in crate::quant) fn recognize(payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let element = element(payload.info.dtype).ok_or_else(|| wrong_dtype(payload, "a float below 16 bits"))?;
    let bits = payload.info.dtype.bits();
    let (rows, cols) = match *payload.info.shape {
        [ref leading @ .., cols] => (leading.iter().product(), cols),
        [] => (1, 1),
    };
    // Rows that end within a byte: one row of all numbers.
    let is_whole = (cols.checked_mul(bits)).is_some_and(|bits| bits.is_multiple_of(8));
    let (rows, cols) = if is_whole { (rows, cols) } else { (1, rows * cols) };
    let Some(row_bits) = cols.checked_mul(bits) else {
        return Err(wrong_shape(payload, "fewer elements"));
    };
    let codes = Codes::Rows { bits: bits as u8, row_stride_bytes: row_bits / 8 }; // Below 16, see `element`.
    Ok(Group {
        name: payload.info.name.to_owned(),
        shape: payload.info.shape.to_vec(),
        family: Family::Plain,
        bits: bits as u8,
        group_size: None,
        is_plain_transposed: false,
        is_symmetric: None,
        members: members([(Role::Payload, Some(payload.id))]),
        recipe: Recipe::of(rows, cols, codes, element).into(),
    })
}

fn element(dtype: Dtype) -> Option<Element> {
    Some(match dtype {
        Dtype::F4 => Element::E2m1,
        Dtype::F6E2m3 => Element::E2m3,
        Dtype::F6E3m2 => Element::E3m2,
        Dtype::F8E4m3 => Element::E4m3,
        Dtype::F8E5m2 => Element::E5m2,
        Dtype::F8E4m3Fnuz => Element::E4m3Fnuz,
        Dtype::F8E5m2Fnuz => Element::E5m2Fnuz,
        Dtype::F8E8m0 => Element::E8m0,
        _ => return None,
    })
}
