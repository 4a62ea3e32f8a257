//! Stretches of files and where they go.

use std::ops::Range;

use crate::checkpoint::{Checkpoint, TensorId};
use crate::placement::{DeviceId, Place};
use crate::plan::{Copy, Steps};
use crate::slice::Pieces;

/// A stretch of a file, or equal pieces of one at equal distances, and where they go.
#[derive(Clone)]
pub(super) struct Segment {
    /// The stored tensor, or the first of several.
    pub(super) id: TensorId,
    pub(super) file: u32,
    pub(super) begin: u64,
    /// Behind the last piece.
    pub(super) end: u64,
    pub(super) piece_len_bytes: u64,
    pub(super) steps: Steps,
    pub(super) device: DeviceId,
    pub(super) target: Place,
    pub(super) way: Way,
    /// The tensors of the result it brings bytes of, or is needed for.
    pub(super) tensors: Range<u32>,
    /// The operation it is a source of, and the ones that must be over before it may land.
    pub(super) operation: Option<u32>,
    pub(super) after: Range<u32>,
}

/// How a segment is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Straight into the arena.
    InPlace,
    /// Into a staging buffer, from its first byte to its last.
    Staged,
    /// As `Staged`, but nothing beside it is read along.
    Alone,
    /// Its pieces only, back to back.
    Pieces,
}

impl Segment {
    /// Returns the bytes of its pieces.
    pub(super) fn len_bytes(&self) -> u64 {
        self.piece_len_bytes * self.steps.count
    }

    /// Returns the copies that bring what of it lies in a range of its file, which was read from the range's start on.
    pub(super) fn copies(&self, bytes: &Range<u64>) -> impl Iterator<Item = Copy> + use<> {
        let Steps { count, source_stride_bytes: stride, target_stride_bytes } = self.steps;
        let (begin, piece, target, read) = (self.begin, self.piece_len_bytes, self.target, bytes.start);
        let (low, high) = (bytes.start.max(begin), bytes.end.min(self.end));
        let copy = move |first: u64, inside: Range<u64>, count: u64| {
            let offset_bytes = target.offset_bytes + first * target_stride_bytes + inside.start;
            let steps = match count {
                1 => Steps::ONCE,
                _ => Steps { count, source_stride_bytes: stride, target_stride_bytes },
            };
            (count > 0 && !inside.is_empty()).then(|| Copy {
                source_offset_bytes: begin + first * stride + inside.start - read,
                target: Place { offset_bytes, ..target },
                len_bytes: inside.end - inside.start,
                steps,
            })
        };
        if low >= high {
            return [None; 3].into_iter().flatten();
        }
        if count == 1 {
            return [copy(0, low - begin..high - begin, 1), None, None].into_iter().flatten();
        }
        // What is left of a piece that begins before the range; whole pieces; the beginning of one that ends behind it.
        let (first, last) = ((low - begin) / stride, (high - 1 - begin) / stride);
        let of_piece = |number: u64| {
            let start = begin + number * stride;
            low.saturating_sub(start).min(piece)..(high - start).min(piece)
        };
        let is_whole = |number: u64| of_piece(number) == (0..piece);
        if first == last {
            return [copy(first, of_piece(first), 1), None, None].into_iter().flatten();
        }
        let (head, tail) = (!is_whole(first), !is_whole(last));
        let whole_first = first + u64::from(head);
        [
            head.then(|| copy(first, of_piece(first), 1)).flatten(),
            copy(whole_first, 0..piece, last + 1 - u64::from(tail) - whole_first),
            tail.then(|| copy(last, of_piece(last), 1)).flatten(),
        ]
        .into_iter()
        .flatten()
    }
}

/// What the segments of one part have in common.
pub(super) struct Destination {
    pub(super) device: DeviceId,
    pub(super) target: Place,
    pub(super) tensors: Range<u32>,
    pub(super) operation: Option<u32>,
    pub(super) after: Range<u32>,
}

/// Adds the segments of a part of a stored tensor: one for each row of equal pieces.
pub(super) fn gather(
    checkpoint: &Checkpoint,
    id: TensorId,
    pieces: &Pieces,
    to: &Destination,
    segments: &mut Vec<Segment>,
) {
    let stored = checkpoint.tensor(id);
    segments.extend(pieces.rows().map(|row| {
        let begin = stored.file_offset_bytes + row.source_offset_bytes;
        let end = begin + (row.steps.count - 1) * row.steps.source_stride_bytes + row.len_bytes;
        let offset_bytes = to.target.offset_bytes + row.target_offset_bytes;
        Segment {
            id,
            file: stored.file,
            begin,
            end,
            piece_len_bytes: row.len_bytes,
            steps: row.steps,
            device: to.device,
            target: Place { offset_bytes, ..to.target },
            way: Way::Staged,
            tensors: to.tensors.clone(),
            operation: to.operation,
            after: to.after.clone(),
        }
    }));
}
