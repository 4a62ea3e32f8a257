//! Which arena each tensor of the result belongs to.

use std::collections::HashMap;

use super::wanted::Wanted;
use crate::checkpoint::Checkpoint;
use crate::placement::{ARENA_LEN_BYTES_MIN, GROUP_DEPTH_MAX, lifetime_groups};
use crate::request::Request;

/// The arena of each tensor: the caller's own memory, or that of the smallest lifetime group around the tensor
/// that is worth one.
pub(super) struct Lifetimes {
    /// Name, and whether it is the caller's own.
    pub(super) arenas: Vec<(String, bool)>,
    pub(super) of_wanted: Vec<u32>,
}

impl Lifetimes {
    pub(super) fn new(checkpoint: &Checkpoint, request: &Request, wanted: &[Wanted<'_>]) -> Lifetimes {
        let len_bytes = len_bytes_of_groups(checkpoint, request, wanted);
        let mut numbers: HashMap<&str, u32> = HashMap::new();
        let mut last: Option<(&str, u32)> = None;
        let mut arenas: Vec<(String, bool)> = Vec::new();
        let mut add = |name: &str, is_external| {
            arenas.push((name.to_owned(), is_external));
            arenas.len() as u32 - 1
        };
        let mut of_wanted = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let name = wanted.name(checkpoint);
            if wanted.is_external {
                of_wanted.push(add(name, true));
                continue;
            }
            let smallest = lifetime_groups(name).next().unwrap_or("");
            if let Some((_, arena)) = last.filter(|(group, _)| *group == smallest) {
                of_wanted.push(arena);
                continue;
            }
            let worth_one = |group: &&str| len_bytes[*group] >= ARENA_LEN_BYTES_MIN;
            let group = lifetime_groups(name).find(worth_one).unwrap_or("");
            let arena = *numbers.entry(group).or_insert_with(|| add(group, false));
            last = Some((smallest, arena));
            of_wanted.push(arena);
        }
        Lifetimes { arenas, of_wanted }
    }
}

/// Sums what each lifetime group takes in the result.
fn len_bytes_of_groups<'w>(
    checkpoint: &'w Checkpoint,
    request: &Request,
    wanted: &'w [Wanted<'_>],
) -> HashMap<&'w str, u64> {
    let mut len_bytes: HashMap<&str, u64> = HashMap::new();
    // Neighbours mostly share their groups: sums stay here until a name leaves them, which spares most look-ups.
    let mut open = [("", 0); GROUP_DEPTH_MAX];
    for wanted in wanted.iter().filter(|wanted| !wanted.is_external) {
        let len = wanted.len_bytes(checkpoint, request);
        for (open, group) in open.iter_mut().zip(lifetime_groups(wanted.name(checkpoint))) {
            if open.0 != group {
                *len_bytes.entry(open.0).or_default() += open.1;
                *open = (group, 0);
            }
            open.1 += len;
        }
    }
    for (group, len) in open {
        *len_bytes.entry(group).or_default() += len;
    }
    len_bytes
}
