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
        let mut groups = Groups::default();
        let mut numbers = Vec::with_capacity(stretches.len());
        for stretch in &stretches {
            numbers.push(match stretch.is_external {
                true => [u32::MAX; GROUP_DEPTH_MAX], // Not asked for.
                false => groups.add(stretch),
            });
        }

        let mut arenas: Vec<Owner> = Vec::new();
        let mut of_wanted = Vec::with_capacity(wanted.len());
        for (stretch, numbers) in stretches.iter().zip(numbers) {
            let (device, is_external) = (stretch.device, stretch.is_external);
            let mut add = |name: &str| {
                arenas.push(Owner { device, name: name.to_owned(), is_external });
                arenas.len() as u32 - 1
            };
            let worth_one =
                |place: &usize| groups.groups[numbers[*place] as usize].len_bytes >= ARENA_LEN_BYTES_MIN;
            let arena = match is_external {
                true => add(stretch.groups[0]),
                false => {
                    let (number, name) = match (0..GROUP_DEPTH_MAX).find(worth_one) {
                        Some(place) => (numbers[place], stretch.groups[place]),
                        None => (groups.number(device, ""), ""),
                    };
                    *groups.groups[number as usize].arena.get_or_insert_with(|| add(name))
                }
            };
            of_wanted.extend(std::iter::repeat_n(arena, stretch.count));
        }
        Lifetimes { arenas, of_wanted }
    }
}

/// The groups of each device by number: finding one by its name takes longer than all that is done with it.
#[derive(Default)]
struct Groups<'r> {
    numbers: HashMap<(DeviceId, &'r str), u32>,
    groups: Vec<Group>,
    /// The one around the last stretch, which is around most of its neighbours too.
    around: Option<((DeviceId, &'r str), u32)>,
}

#[derive(Default)]
struct Group {
    len_bytes: u64,
    arena: Option<u32>,
}

impl<'r> Groups<'r> {
    /// Counts a stretch in its groups, and returns their numbers.
    fn add(&mut self, stretch: &Stretch<'r>) -> [u32; GROUP_DEPTH_MAX] {
        let [smallest, around] = stretch.groups;
        let around_number = match self.around {
            Some((last, number)) if last == (stretch.device, around) => number,
            _ => self.number(stretch.device, around),
        };
        self.around = Some(((stretch.device, around), around_number));
        self.groups[around_number as usize].len_bytes += stretch.len_bytes;
        if smallest == around {
            return [around_number; GROUP_DEPTH_MAX];
        }
        let number = self.number(stretch.device, smallest);
        self.groups[number as usize].len_bytes += stretch.len_bytes;
        [number, around_number]
    }

    fn number(&mut self, device: DeviceId, name: &'r str) -> u32 {
        *self.numbers.entry((device, name)).or_insert_with(|| {
            self.groups.push(Group::default());
            self.groups.len() as u32 - 1
        })
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
