//! Lists with one number a dimension.

use smallvec::{SmallVec, smallvec};

/// A shape or an index: one number a dimension, outermost first. Up to three are kept in place: planning handles some of these for
/// every tensor, and an allocation for each would take as long as the rest.
///
/// Made [from](From) a slice or a `Vec`; used as a slice.
pub type Dims = SmallVec<[u64; 3]>;

/// Returns the elements between neighbours of each dimension, where the last is contiguous.
pub(crate) fn row_major(shape: &[u64]) -> Dims {
    let mut strides: Dims = smallvec![1; shape.len()];
    for dim in (1..shape.len()).rev() {
        // Saturated only beside a dimension of 0, where nothing has an address.
        strides[dim - 1] = strides[dim].saturating_mul(shape[dim]);
    }
    strides
}
