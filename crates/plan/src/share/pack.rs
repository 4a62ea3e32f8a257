//! From the reads of one round to its messages.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Landing, Packed, Receive, Send, Turn, rank_of};
use crate::plan::{Copy, Plan, Steps};

/// Works out what the ranks exchange in one round, in which each does these reads.
///
/// Both sides of a message come from one step of one walk, so that what a rank sends to a peer and what that receives from it agree in
/// number, order and length, which is what makes an exchange of all of them at once end.
pub(super) fn round(plan: &Plan, reads: Vec<Range<u32>>) -> Vec<Turn> {
    let turn = |reads| Turn { reads, ..Turn::default() };
    let mut turns: Vec<Turn> = reads.into_iter().map(turn).collect();
    let mut received_ends = vec![0; turns.len()];
    for sender in 0..turns.len() as u32 {
        let bundles = bundles(plan, sender, turns[sender as usize].reads.clone());
        for peer in (0..turns.len() as u32).filter(|peer| *peer != sender) {
            let end = &mut received_ends[peer as usize];
            let messages = messages(&bundles, peer, end);
            for Message { offset_bytes, len_bytes, landing, unpacked } in messages {
                turns[sender as usize].sends.push(Send { peer, offset_bytes, len_bytes });
                let receiver = &mut turns[peer as usize];
                receiver.receives.push(Receive { peer: sender, len_bytes, landing });
                receiver.unpacked.extend(unpacked);
            }
        }
        turns[sender as usize].packed = bundles.into_iter().map(|bundle| bundle.packed).collect();
    }
    turns
}

/// Bytes of a read that some peers get.
struct Bundle {
    packed: Packed,
    /// Ascending by peer, each once, with where it puts them.
    takers: Vec<(u32, Copy)>,
}

/// Which pieces of which read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pieces {
    read: u32,
    source_offset_bytes: u64,
    len_bytes: u64,
    count: u64,
    stride_bytes: u64,
    /// Goes up where one peer takes the same pieces again, for another of its tensors.
    again: u32,
}

/// Packs what a rank has read for others: what several take lies there once, and what the same peers take lies together, so that few
/// messages carry it.
fn bundles(plan: &Plan, sender: u32, reads: Range<u32>) -> Vec<Bundle> {
    let mut takers: BTreeMap<Pieces, Vec<(u32, Copy)>> = BTreeMap::new();
    for read in reads {
        for copy in plan.copies(&plan.reads()[read as usize]) {
            let peer = rank_of(plan, copy);
            if peer == sender {
                continue;
            }
            let mut pieces = Pieces {
                read,
                source_offset_bytes: copy.source_offset_bytes,
                len_bytes: copy.len_bytes,
                count: copy.steps.count,
                stride_bytes: copy.steps.source_stride_bytes,
                again: 0,
            };
            while takers.get(&pieces).is_some_and(|takers| takers.iter().any(|(taker, _)| *taker == peer)) {
                pieces.again += 1;
            }
            takers.entry(pieces).or_default().push((peer, *copy));
        }
    }
    let mut bundles: Vec<_> = takers.into_iter().collect();
    bundles.iter_mut().for_each(|(_, takers)| takers.sort_by_key(|(peer, _)| *peer));
    let peers = |takers: &[(u32, Copy)]| takers.iter().map(|(peer, _)| *peer).collect::<Vec<_>>();
    bundles.sort_by_cached_key(|(pieces, takers)| (peers(takers), *pieces));
    let mut end = 0;
    let packed = bundles.into_iter().map(|(pieces, takers)| {
        let packed = Packed {
            read: pieces.read,
            source_offset_bytes: pieces.source_offset_bytes,
            piece_len_bytes: pieces.len_bytes,
            piece_count: pieces.count,
            source_stride_bytes: pieces.stride_bytes,
            offset_bytes: end,
        };
        end += packed.len_bytes();
        Bundle { packed, takers }
    });
    packed.collect()
}

/// A range of a send buffer on its way to one peer.
struct Message {
    offset_bytes: u64,
    len_bytes: u64,
    landing: Landing,
    unpacked: Vec<Copy>,
}

/// Makes as few messages for a peer as its bundles lie apart, in the send buffer or where they land.
fn messages(bundles: &[Bundle], peer: u32, received_end: &mut u64) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    for bundle in bundles {
        let Some((_, copy)) = bundle.takers.iter().find(|(taker, _)| *taker == peer) else { continue };
        let (offset_bytes, len_bytes) = (bundle.packed.offset_bytes, bundle.packed.len_bytes());
        let is_dense = copy.steps.is_once() || copy.steps.target_stride_bytes == copy.len_bytes;
        let lands = is_dense && len_bytes >= IN_PLACE_LEN_BYTES_MIN;
        if let Some(last) =
            messages.last_mut().filter(|last| last.offset_bytes + last.len_bytes == offset_bytes)
        {
            match last.landing {
                Landing::InPlace(place)
                    if is_dense
                        && place.arena == copy.target.arena
                        && place.offset_bytes + last.len_bytes == copy.target.offset_bytes =>
                {
                    last.len_bytes += len_bytes;
                    continue;
                }
                Landing::Buffered(start) if !lands => {
                    last.unpacked.push(unpack(copy, start + last.len_bytes));
                    last.len_bytes += len_bytes;
                    *received_end = start + last.len_bytes;
                    continue;
                }
                _ => {}
            }
        }
        let message = if lands {
            Message { offset_bytes, len_bytes, landing: Landing::InPlace(copy.target), unpacked: Vec::new() }
        } else {
            let start = received_end.next_multiple_of(MESSAGE_ALIGN_BYTES);
            *received_end = start + len_bytes;
            let unpacked = vec![unpack(copy, start)];
            Message { offset_bytes, len_bytes, landing: Landing::Buffered(start), unpacked }
        };
        messages.push(message);
    }
    messages
}

/// Returns the copy that takes packed pieces from there in the receive buffer to where they belong.
fn unpack(copy: &Copy, source_offset_bytes: u64) -> Copy {
    if !copy.steps.is_once() && copy.steps.target_stride_bytes == copy.len_bytes {
        let len_bytes = copy.len_bytes * copy.steps.count;
        return Copy { source_offset_bytes, len_bytes, steps: Steps::ONCE, ..*copy };
    }
    let source_stride_bytes = if copy.steps.is_once() { 0 } else { copy.len_bytes };
    let steps = Steps { source_stride_bytes, ..copy.steps };
    Copy { source_offset_bytes, steps, ..*copy }
}

/// Shorter bytes share a message and are copied once more, on the device, where 64 KiB take less time than a message of their own.
const IN_PLACE_LEN_BYTES_MIN: u64 = 64 << 10;

/// Where messages begin in a receive buffer: kernels that take them apart are fastest from there.
const MESSAGE_ALIGN_BYTES: u64 = 256;
