//! The copies and messages of one rank's turn, in terms of its memory.

use std::sync::Arc;

use tensorhaul_device::{Allocation, Location, Piece, StridedCopy};
use tensorhaul_exchange::Message;
use tensorhaul_plan::plan::Copy;
use tensorhaul_plan::share::{Landing, Packed, Turn};

use super::memory::Memory;

/// A copy out of a staging buffer.
pub(super) struct Out<'m> {
    pub(super) source_offset_bytes: u64,
    pub(super) target: &'m Arc<dyn Allocation>,
    pub(super) strides: StridedCopy,
}

impl<'m> Out<'m> {
    /// Of bytes that are the rank's own.
    pub(super) fn own(copy: &Copy, memory: &'m Memory) -> Out<'m> {
        let strides = StridedCopy {
            piece_len_bytes: copy.len_bytes,
            piece_count: copy.steps.count,
            source_stride_bytes: copy.steps.source_stride_bytes,
            target_stride_bytes: copy.steps.target_stride_bytes,
            target_offset_bytes: copy.target.offset_bytes,
        };
        Out {
            source_offset_bytes: copy.source_offset_bytes,
            target: memory.location(copy.target).allocation,
            strides,
        }
    }

    /// Of bytes that are others', into the send buffer.
    pub(super) fn packed(packed: &Packed, target: &'m Arc<dyn Allocation>) -> Out<'m> {
        let strides = StridedCopy {
            piece_len_bytes: packed.piece_len_bytes,
            piece_count: packed.piece_count,
            source_stride_bytes: packed.source_stride_bytes,
            target_stride_bytes: packed.piece_len_bytes,
            target_offset_bytes: packed.offset_bytes,
        };
        Out { source_offset_bytes: packed.source_offset_bytes, target, strides }
    }

    /// Returns it where it is of one piece.
    pub(super) fn piece(&self) -> Piece<'m> {
        Piece {
            source_offset_bytes: self.source_offset_bytes as usize,
            len_bytes: self.strides.piece_len_bytes as usize,
            target: self.target,
            target_offset_bytes: self.strides.target_offset_bytes,
        }
    }
}

/// Returns what a rank sends and receives in a round.
pub(super) fn messages<'m>(
    turn: &Turn,
    slot: usize,
    memory: &'m Memory,
) -> (Vec<Message<'m>>, Vec<Message<'m>>) {
    let sends = turn.sends.iter().map(|send| {
        let start = Location { allocation: &memory.send[slot], offset_bytes: send.offset_bytes };
        Message { peer: send.peer, start, len_bytes: send.len_bytes }
    });
    let receives = turn.receives.iter().map(|receive| {
        let start = match receive.landing {
            Landing::InPlace(place) => memory.location(place),
            Landing::Buffered(offset_bytes) => Location { allocation: &memory.receive, offset_bytes },
        };
        Message { peer: receive.peer, start, len_bytes: receive.len_bytes }
    });
    (sends.collect(), receives.collect())
}
