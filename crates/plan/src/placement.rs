//! Where tensors end up: devices, arenas, and the groups that live and die together.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// The memory a tensor is handed over in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DeviceId {
    /// The host's own memory.
    Host,
    /// An NVIDIA device, by its ordinal in the driver's order.
    Cuda(u32),
    /// An AMD device, by its ordinal in the driver's order.
    Rocm(u32),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceId::Host => f.write_str("host"),
            DeviceId::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceId::Rocm(ordinal) => write!(f, "rocm:{ordinal}"),
        }
    }
}

impl FromStr for DeviceId {
    type Err = UnknownDevice;

    /// Parses `host` (or `cpu`), `cuda:N` and `rocm:N`; `cuda` and `rocm` alone mean ordinal 0.
    fn from_str(text: &str) -> Result<DeviceId, UnknownDevice> {
        let unknown = || UnknownDevice(text.to_owned());
        let (vendor, ordinal) = match text.split_once(':') {
            Some((vendor, ordinal)) => (vendor, Some(ordinal.parse().map_err(|_| unknown())?)),
            None => (text, None),
        };
        match (vendor, ordinal) {
            ("host" | "cpu", None) => Ok(DeviceId::Host),
            ("cuda", ordinal) => Ok(DeviceId::Cuda(ordinal.unwrap_or(0))),
            ("rocm", ordinal) => Ok(DeviceId::Rocm(ordinal.unwrap_or(0))),
            _ => Err(unknown()),
        }
    }
}

impl Serialize for DeviceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Text that names no device.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownDevice(pub String);

impl fmt::Display for UnknownDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} names no device; host (or cpu), cuda:0 and rocm:0 do", self.0)
    }
}

impl std::error::Error for UnknownDevice {}

/// One allocation on one device. Its tensors are views, so dropping the last of them frees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Arena {
    /// Where the memory is.
    pub device: DeviceId,
    /// The name prefix whose tensors live here, such as `model.layers.3`; empty for the rest. The tensor's own
    /// name where the memory is the caller's.
    pub group: String,
    /// Whether the memory is the caller's own: exactly one tensor's bytes, at its start.
    pub is_external: bool,
    /// Whether it holds sources of operations, and is let go when the load is over.
    pub is_scratch: bool,
    /// Length of the allocation; a multiple of the plan's congruence, unless it is the caller's own.
    pub len_bytes: u64,
}

/// A byte range of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Which arena, by its place in [`Plan::arenas`](crate::Plan::arenas).
    pub arena: u32,
    /// Distance from the start of the arena.
    pub offset_bytes: u64,
}

/// Returns the prefixes of a tensor name that may own an arena, the longest first: the expert,
/// then the layer. Every path component that is a number closes a group.
///
/// `model.layers.3.mlp.experts.17.w1.weight` gives `model.layers.3.mlp.experts.17`, then
/// `model.layers.3`. Names without numbers belong to the checkpoint as a whole.
pub fn lifetime_groups(name: &str) -> impl Iterator<Item = &str> {
    let mut ends = [None; GROUP_DEPTH_MAX];
    let (mut depth, mut start, mut is_number) = (0, 0, true);
    for (end, byte) in name.bytes().enumerate() {
        if byte != b'.' {
            is_number &= byte.is_ascii_digit();
            continue;
        }
        // A number at the very start or end names no group of tensors: it is one tensor's own name.
        if is_number && start > 0 && end > start {
            ends[depth] = Some(end);
            depth += 1;
            if depth == GROUP_DEPTH_MAX {
                break;
            }
        }
        (start, is_number) = (end + 1, true);
    }
    ends.into_iter().rev().flatten().map(|end| &name[..end])
}

/// Layer, expert: deeper numbers (a list inside an expert) do not make groups of their own.
pub(crate) const GROUP_DEPTH_MAX: usize = 2;

/// A group smaller than this shares the arena of the group around it: allocators of devices hand
/// out 2 MiB pages, and the host's huge pages are as large.
pub const ARENA_LEN_BYTES_MIN: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_the_expert_then_the_layer() {
        let groups = |name| lifetime_groups(name).collect::<Vec<_>>();
        assert_eq!(
            groups("model.layers.3.mlp.experts.17.w1.weight"),
            ["model.layers.3.mlp.experts.17", "model.layers.3"]
        );
        assert_eq!(groups("h.0.attn.weight"), ["h.0"]);
        assert_eq!(groups("lm_head.weight"), [""; 0]);
        assert_eq!(groups("0.weight"), [""; 0]);
        assert_eq!(groups("blocks.12"), [""; 0]);
        assert_eq!(groups("a.1.b.2.c.3.d"), ["a.1.b.2", "a.1"]);
    }

    #[test]
    fn devices_print_as_they_parse() {
        for text in ["host", "cuda:0", "rocm:7"] {
            assert_eq!(text.parse::<DeviceId>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceId::Cuda(0)));
        assert_eq!("cpu".parse(), Ok(DeviceId::Host));
        for text in ["", "gpu", "host:0", "cuda:x", "cuda:-1"] {
            assert!(text.parse::<DeviceId>().is_err(), "{text}");
        }
    }
}
