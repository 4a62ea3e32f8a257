//! Which arena each tensor of the result belongs to.

use std::collections::HashMap;

use super::wanted::Wanted;
use crate::placement::{ARENA_LEN_BYTES_MIN, DeviceId, GROUP_DEPTH_MAX, lifetime_groups};
use crate::request::Request;

/// The arena of each tensor: the caller's own memory, or that of the smallest lifetime group around the tensor
/// that is worth one.
pub(super) struct Lifetimes {
    pub(super) arenas: Vec<Owner>,
    pub(super) of_wanted: Vec<u32>,
}

/// Whose tensors an arena holds.
pub(super) struct Owner {
    pub(super) device: DeviceId,
    /// The group's name, or the tensor's.
    pub(super) name: String,
    /// Whether the memory is the caller's own.
    pub(super) is_external: bool,
}

impl Lifetimes {
    pub(super) fn new(request: &Request, wanted: &[Wanted<'_>]) -> Lifetimes {
        let stretches = stretches(request, wanted);
        let mut len_bytes: HashMap<(DeviceId, &str), u64> = HashMap::new();
        // The sum of the layer, or whatever is around the smallest group, stays here until a name leaves it.
        let mut open = ((DeviceId::Host, ""), 0);
        for stretch in stretches.iter().filter(|stretch| !stretch.is_external) {
            let [smallest, around] = stretch.groups.map(|group| (stretch.device, group));
            if smallest.1 != around.1 {
                *len_bytes.entry(smallest).or_default() += stretch.len_bytes;
            }
            if open.0 != around {
                *len_bytes.entry(open.0).or_default() += open.1;
                open = (around, 0);
            }
            open.1 += stretch.len_bytes;
        }
        *len_bytes.entry(open.0).or_default() += open.1;

        let mut numbers: HashMap<(DeviceId, &str), u32> = HashMap::new();
        let mut arenas: Vec<Owner> = Vec::new();
        let mut of_wanted = Vec::with_capacity(wanted.len());
        for stretch in stretches {
            let (device, is_external) = (stretch.device, stretch.is_external);
            let mut add = |name: &str| {
                arenas.push(Owner { device, name: name.to_owned(), is_external });
                arenas.len() as u32 - 1
            };
            let worth_one = |group: &&str| len_bytes[&(device, *group)] >= ARENA_LEN_BYTES_MIN;
            let arena = match is_external {
                true => add(stretch.groups[0]),
                false => {
                    let group = stretch.groups.into_iter().find(worth_one).unwrap_or("");
                    *numbers.entry((device, group)).or_insert_with(|| add(group))
                }
            };
            of_wanted.extend(std::iter::repeat_n(arena, stretch.count));
        }
        Lifetimes { arenas, of_wanted }
    }
}

/// Neighbours of the same groups on the same device, or one tensor in the caller's own memory.
struct Stretch<'r> {
    device: DeviceId,
    /// The smallest group and the one around it; the same one twice, or the checkpoint's `""`, where there are no more. The tensor's name
    /// where the memory is the caller's.
    groups: [&'r str; GROUP_DEPTH_MAX],
    is_external: bool,
    count: usize,
    len_bytes: u64,
}

fn stretches<'r>(request: &Request, wanted: &[Wanted<'r>]) -> Vec<Stretch<'r>> {
    let mut stretches: Vec<Stretch<'_>> = Vec::new();
    for wanted in wanted {
        let (name, device, is_external) = (wanted.name(), wanted.device, wanted.external.is_some());
        let groups = match is_external {
            true => [name; GROUP_DEPTH_MAX],
            false => {
                let mut groups = lifetime_groups(name);
                let smallest = groups.next().unwrap_or("");
                [smallest, groups.next().unwrap_or(smallest)]
            }
        };
        let len_bytes = wanted.len_bytes(request);
        match stretches.last_mut() {
            Some(last)
                if !last.is_external
                    && (last.device, last.groups, false) == (device, groups, is_external) =>
            {
                last.count += 1;
                last.len_bytes += len_bytes;
            }
            _ => stretches.push(Stretch { device, groups, is_external, count: 1, len_bytes }),
        }
    }
    stretches
}
