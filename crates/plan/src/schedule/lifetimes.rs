//! Which arena each tensor of the result belongs to.

use std::collections::HashMap;

use super::wanted::Wanted;
use crate::checkpoint::Checkpoint;
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
    pub(super) fn new<'r>(checkpoint: &'r Checkpoint, request: &Request, wanted: &[Wanted<'r>]) -> Lifetimes {
        let len_bytes = len_bytes_of_groups(checkpoint, request, wanted);
        let mut numbers: HashMap<(DeviceId, &str), u32> = HashMap::new();
        let mut last: Option<(DeviceId, &str, u32)> = None;
        let mut arenas: Vec<Owner> = Vec::new();
        let mut add = |device, name: &str, is_external| {
            arenas.push(Owner { device, name: name.to_owned(), is_external });
            arenas.len() as u32 - 1
        };
        let mut of_wanted = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let (name, device) = (wanted.name(checkpoint), wanted.device);
            if wanted.external.is_some() {
                of_wanted.push(add(device, name, true));
                continue;
            }
            let smallest = lifetime_groups(name).next().unwrap_or("");
            if let Some((.., arena)) = last.filter(|(on, group, _)| (*on, *group) == (device, smallest)) {
                of_wanted.push(arena);
                continue;
            }
            let worth_one = |group: &&str| len_bytes[&(device, *group)] >= ARENA_LEN_BYTES_MIN;
            let group = lifetime_groups(name).find(worth_one).unwrap_or("");
            let arena = *numbers.entry((device, group)).or_insert_with(|| add(device, group, false));
            last = Some((device, smallest, arena));
            of_wanted.push(arena);
        }
        Lifetimes { arenas, of_wanted }
    }
}

/// Sums what each lifetime group takes in the result.
fn len_bytes_of_groups<'r>(
    checkpoint: &'r Checkpoint,
    request: &Request,
    wanted: &[Wanted<'r>],
) -> HashMap<(DeviceId, &'r str), u64> {
    let mut len_bytes: HashMap<(DeviceId, &str), u64> = HashMap::new();
    // Neighbours mostly share their groups: sums stay here until a name leaves them, which spares most look-ups.
    let mut open = [((DeviceId::Host, ""), 0); GROUP_DEPTH_MAX];
    for wanted in wanted.iter().filter(|wanted| wanted.external.is_none()) {
        let len = wanted.len_bytes(checkpoint, request);
        for (open, group) in open.iter_mut().zip(lifetime_groups(wanted.name(checkpoint))) {
            if open.0 != (wanted.device, group) {
                *len_bytes.entry(open.0).or_default() += open.1;
                *open = ((wanted.device, group), 0);
            }
            open.1 += len;
        }
    }
    for (group, len) in open {
        *len_bytes.entry(group).or_default() += len;
    }
    len_bytes
}
