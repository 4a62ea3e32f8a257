//! What the machine brings to a plan.

use serde::Serialize;

use crate::in_place::InPlace;
use crate::placement::DeviceId;

/// What the machine brings to a plan: the staging buffers, and what storage can write straight
/// into the memory the tensors are handed over in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Length of a staging buffer, and of the largest read into one; a multiple of 4096.
    pub buffer_len_bytes: u64,
    /// Number of staging buffers.
    pub buffer_count: u32,
    /// Direct (`O_DIRECT`) reads start and end at multiples of this, a power of two up to 4096, as
    /// probed; 1 when no file can be read directly.
    pub direct_align_bytes: u64,
    /// Which reads may land in the tensors' own memory: those into host and unified memory, where a stop in the staging ring
    /// would copy every byte once more, and those that direct storage can do.
    pub in_place: InPlace,
    /// Which devices can copy to which, source first: a tensor for both is read for the first only.
    pub peers: Vec<(DeviceId, DeviceId)>,
}

impl Default for Machine {
    /// 64 buffers of 4 MiB, direct reads of whole pages, and no memory that storage can write to: an
    /// accelerator.
    fn default() -> Machine {
        Machine {
            buffer_len_bytes: 4 << 20,
            buffer_count: 64,
            direct_align_bytes: 4096,
            in_place: InPlace::never(),
            peers: Vec::new(),
        }
    }
}
