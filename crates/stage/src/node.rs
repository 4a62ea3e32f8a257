//! Which memory node the pages of a mapping come from.

use std::ffi::c_void;
use std::io;

/// Where the system was asked to put host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Wherever whoever touches a page first happens to run.
    #[default]
    Anywhere,
    /// On this memory node, and elsewhere only where that is full.
    Near(u32),
    /// Anywhere, because the system refused to put it on this node.
    Refused {
        /// The node asked for.
        node: u32,
        /// The system's number for why.
        errno: i32,
    },
}

/// Asks for pages of a node, for those that nothing has touched yet.
///
/// Preferred, not bound: a node without room is no reason to fail.
///
/// # Source
/// Linux, mbind(2), `MPOL_PREFERRED`.
pub(crate) fn prefer(start: *mut c_void, len_bytes: usize, node: u32) -> Placement {
    let mut nodes = vec![0 as libc::c_ulong; (node / MASK_BITS + 1) as usize];
    nodes[(node / MASK_BITS) as usize] = 1 << (node % MASK_BITS);
    // The kernel reads one bit less than it is told.
    let bit_count = nodes.len() * MASK_BITS as usize + 1;
    // SAFETY: the kernel reads as many bits of the mask as it has, and changes no contents of the range, whatever that is.
    let code = unsafe {
        libc::syscall(libc::SYS_mbind, start, len_bytes, libc::MPOL_PREFERRED, nodes.as_ptr(), bit_count, 0)
    };
    match code {
        0 => Placement::Near(node),
        _ => {
            Placement::Refused { node, errno: io::Error::last_os_error().raw_os_error().unwrap_or_default() }
        }
    }
}

const MASK_BITS: u32 = libc::c_ulong::BITS;
