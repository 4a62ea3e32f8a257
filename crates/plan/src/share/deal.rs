//! Which rank does which reads, round by round.

use std::ops::Range;

use crate::machine::Machine;
use crate::plan::{Brought, Plan, Read};

/// The reads of every rank, by round and then by rank. A turn is at most one staging buffer long, and has at most half as many reads as
/// there are buffers: a round and the next then have buffers for all of their reads, so that no read waits for one that a later one holds.
pub(super) fn deal(plan: &Plan, size: usize) -> Vec<Vec<Range<u32>>> {
    match plan.operations() {
        [] => runs(plan, size),
        _ => stripes(plan, size),
    }
}

/// Gives each rank one run of the reads: the one in whose equal part of all bytes a read's middle lies. So a run is at most one read
/// longer or shorter than the others' mean, and each rank reads forwards through files of its own.
fn runs(plan: &Plan, size: usize) -> Vec<Vec<Range<u32>>> {
    let total_bytes = u128::from(plan.promised().read_bytes);
    let mut runs = vec![0..0; size];
    let (mut before_bytes, mut rank) = (0, 0);
    for (number, read) in (0..).zip(plan.reads()) {
        let len_bytes = u128::from(read.len_bytes());
        let its = ((2 * before_bytes + len_bytes) * size as u128 / (2 * total_bytes)) as usize;
        if its > rank {
            runs[rank + 1..=its].fill(number..number);
            rank = its;
        }
        runs[rank].end = number + 1;
        before_bytes += len_bytes;
    }
    let turns: Vec<_> = runs.into_iter().map(|reads| turns(plan, reads)).collect();
    let round_count = turns.iter().map(Vec::len).max().unwrap_or(0);
    let of_round =
        |round: usize| turns.iter().map(|turns| turns.get(round).cloned().unwrap_or(0..0)).collect();
    (0..round_count).map(of_round).collect()
}

/// Cuts a run into turns.
fn turns(plan: &Plan, reads: Range<u32>) -> Vec<Range<u32>> {
    let mut turns: Vec<Turn> = Vec::new();
    for number in reads {
        let read = &plan.reads()[number as usize];
        if !turns.last_mut().is_some_and(|turn| turn.take(number, read, plan.machine())) {
            turns.push(Turn::of(number, read));
        }
    }
    turns.into_iter().map(|turn| turn.reads).collect()
}

/// Deals the reads out a staging buffer at a time, so that the ranks go through the files side by side and bytes arrive in the plan's
/// order, round by round: sources of operations wait in rings that were planned in that order.
///
/// What a read lands on has to be worked off in an earlier round, so a read that waits for an operation of the round at hand begins
/// the next.
fn stripes(plan: &Plan, size: usize) -> Vec<Vec<Range<u32>>> {
    let mut rounds: Vec<Vec<Option<Turn>>> = Vec::new();
    let mut read_bytes = vec![0; size];
    let mut rank = 0;
    let mut progress = Progress::new(plan);
    for (number, read) in (0..).zip(plan.reads()) {
        let round = rounds.len().saturating_sub(1);
        let waits = read.after.clone().any(|operation| progress.ready_in(operation) == Some(round));
        let is_taken = !waits
            && rounds
                .last_mut()
                .and_then(|round| round[rank].as_mut())
                .is_some_and(|turn| turn.take(number, read, plan.machine()));
        if !is_taken {
            if waits || rounds.last().is_none_or(|round| round.iter().all(Option::is_some)) {
                rounds.push(vec![None; size]);
            }
            let turns = rounds.last_mut().expect("one was pushed, if there was none");
            // Whoever has read least of those without a turn, so that short rounds do not add up on one rank.
            let free = (0..size).filter(|rank| turns[*rank].is_none());
            rank = free.min_by_key(|rank| read_bytes[*rank]).expect("not all have a turn");
            turns[rank] = Some(Turn::of(number, read));
        }
        read_bytes[rank] += read.len_bytes();
        progress.done(number, rounds.len() - 1);
    }
    let reads = |turn: Option<Turn>| turn.map_or(0..0, |turn| turn.reads);
    rounds.into_iter().map(|turns| turns.into_iter().map(reads).collect()).collect()
}

/// A rank's reads of a round.
#[derive(Clone)]
struct Turn {
    reads: Range<u32>,
    len_bytes: u64,
}

impl Turn {
    fn of(number: u32, read: &Read) -> Turn {
        Turn { reads: number..number + 1, len_bytes: read.len_bytes() }
    }

    /// Adds the next read, if there is room for it.
    fn take(&mut self, number: u32, read: &Read, machine: &Machine) -> bool {
        let reads_max = (machine.buffer_count / 2).max(1);
        let len_bytes = self.len_bytes + read.len_bytes();
        if len_bytes > machine.buffer_len_bytes || self.reads.len() as u32 >= reads_max {
            return false;
        }
        (self.reads.end, self.len_bytes) = (number + 1, len_bytes);
        true
    }
}

/// Which operations have all of their sources, and since which round.
pub(super) struct Progress<'p> {
    plan: &'p Plan,
    /// For each operation, how many reads are to come.
    left: Vec<u32>,
    /// For each operation, the round that brings the last of its sources, when that is known.
    ready: Vec<Option<usize>>,
}

impl<'p> Progress<'p> {
    pub(super) fn new(plan: &'p Plan) -> Progress<'p> {
        let left = plan.operations().iter().map(|operation| operation.read_count).collect();
        Progress { plan, left, ready: vec![None; plan.operations().len()] }
    }

    /// Notes that a read is done in a round; returns the operations that are ready with it.
    pub(super) fn done(&mut self, read: u32, round: usize) -> Vec<u32> {
        let Progress { plan, left, ready } = self;
        let brought = plan.brought(&plan.reads()[read as usize]).iter();
        let operations = brought.filter_map(|brought| match *brought {
            Brought::Operation(operation) => Some(operation),
            Brought::Tensor(_) => None,
        });
        let is_ready = |operation: &u32| {
            let left = &mut left[*operation as usize];
            *left -= 1;
            if *left == 0 {
                ready[*operation as usize] = Some(round);
            }
            *left == 0
        };
        operations.filter(is_ready).collect()
    }

    /// Returns the round in which an operation has become ready; `None` where it is not, and where there is nothing to do.
    pub(super) fn ready_in(&self, operation: u32) -> Option<usize> {
        self.ready[operation as usize]
    }
}
