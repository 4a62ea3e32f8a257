//! A box of elements, seen under another shape of the same tensor.

use std::ops::Range;

/// Returns the ranges of dims `to` that hold what these ranges of dims `from` hold, in the same order; `None` where that is no
/// box of `to`. Both shapes are of the same number of elements.
///
/// A box of `[8, 128]` is one of `[16, 64]` where it is whole rows, or half a row: rows 2 and 3 are rows 4 to 7, and columns 64 to 127
/// of row 2 are row 5; columns 64 to 127 of all rows are none.
pub(super) fn reshaped(
    from: impl IntoIterator<Item = (u64, Range<u64>)>,
    to: &[u64],
) -> Option<Vec<Range<u64>>> {
    let mut from = from.into_iter();
    let mut result = Vec::with_capacity(to.len());
    let mut left = (1, 0..1);
    for &len in to {
        while len == 0 || left.0 < len || left.0 % len != 0 {
            left = joined(left, from.next()?)?;
        }
        let inner = left.0 / len;
        let (range, within) = split(&left.1, inner)?;
        result.push(range);
        left = (inner, within);
    }
    (left.0 == 1 && from.all(|(len, _)| len == 1)).then_some(result)
}

/// Two neighbouring dims as one.
fn joined(
    (outer_len, outer): (u64, Range<u64>),
    (len, range): (u64, Range<u64>),
) -> Option<(u64, Range<u64>)> {
    let all = outer_len.checked_mul(len)?;
    if range == (0..len) {
        Some((all, outer.start * len..outer.end * len))
    } else if outer.end - outer.start == 1 {
        Some((all, outer.start * len + range.start..outer.start * len + range.end))
    } else {
        None
    }
}

/// A range of a dim as ranges of two, the inner one so long.
fn split(range: &Range<u64>, inner: u64) -> Option<(Range<u64>, Range<u64>)> {
    if range.start.is_multiple_of(inner) && range.end.is_multiple_of(inner) {
        return Some((range.start / inner..range.end / inner, 0..inner));
    }
    let (outer, last) = (range.start / inner, (range.end - 1) / inner);
    (outer == last).then(|| (outer..outer + 1, range.start % inner..(range.end - 1) % inner + 1))
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a box of one dimension is one range")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The places of a box's elements, ascending.
    fn places(dims: &[(u64, Range<u64>)]) -> Vec<u64> {
        dims.iter().fold(vec![0], |outer, (len, range)| {
            outer.iter().flat_map(|place| range.clone().map(move |index| place * len + index)).collect()
        })
    }

    #[test]
    fn whole_rows_and_parts_of_one_are_boxes_of_longer_and_shorter_rows() {
        let of = |rows: Range<u64>, cols: Range<u64>, to: &[u64]| reshaped([(8, rows), (128, cols)], to);
        assert_eq!(of(2..4, 0..128, &[16, 64]), Some(vec![4..8, 0..64]));
        assert_eq!(of(2..3, 64..128, &[16, 64]), Some(vec![5..6, 0..64]));
        assert_eq!(of(2..3, 70..74, &[16, 64]), Some(vec![5..6, 6..10]));
        assert_eq!(of(2..3, 60..74, &[16, 64]), None);
        assert_eq!(of(0..8, 64..128, &[16, 64]), None);
        assert_eq!(of(2..4, 0..128, &[1024]), Some(vec![256..512]));
        assert_eq!(of(2..4, 32..64, &[8, 4, 32]), Some(vec![2..4, 1..2, 0..32]));
        assert_eq!(of(2..4, 0..128, &[2, 4, 1, 128, 1]), Some(vec![0..1, 2..4, 0..1, 0..128, 0..1]));
        assert_eq!(of(2..4, 0..128, &[8, 100]), None);
    }

    proptest! {
        #[test]
        fn the_same_elements_are_meant(
            dims in vec((prop::sample::select(vec![1u64, 2, 3, 4, 6]), 0u64..6, 1u64..7), 1..4),
            cuts in vec(prop::sample::select(vec![1u64, 2, 3, 4, 6, 12]), 0..4),
        ) {
            let from: Vec<_> = dims.iter().map(|&(len, start, count)| {
                let start = start.min(len - 1);
                (len, start..(start + count).min(len))
            }).collect();
            let all: u64 = from.iter().map(|(len, _)| len).product();
            let mut to = cuts;
            let outer: u64 = to.iter().product();
            prop_assume!(all.is_multiple_of(outer));
            to.push(all / outer);
            if let Some(ranges) = reshaped(from.clone(), &to) {
                let found: Vec<_> = to.into_iter().zip(ranges).collect();
                prop_assert_eq!(places(&from), places(&found));
            }
            let same: Vec<u64> = from.iter().map(|(len, _)| *len).collect();
            let ranges: Vec<_> = from.iter().map(|(_, range)| range.clone()).collect();
            prop_assert_eq!(reshaped(from, &same), Some(ranges));
        }
    }
}
