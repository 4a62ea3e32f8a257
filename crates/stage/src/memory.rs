//! Host memory that is page-aligned, zeroed, and stays where it is.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::node::{self, Placement};

/// A block of host memory that a ring can be cut from: the host's own, or a device driver's pinned memory.
///
/// # Safety
/// For the life of the value the `len_bytes` bytes from `as_ptr` are readable, writable and initialized,
/// do not move, and are touched by nobody but through the ring (and the hardware the ring's user
/// hands buffers to).
pub unsafe trait StagingMemory: Send + Sync {
    /// Returns the first byte, page-aligned.
    fn as_ptr(&self) -> NonNull<u8>;

    /// Returns the length.
    fn len_bytes(&self) -> usize;
}

/// Private anonymous memory: zeroed, page-aligned, on huge pages where the system grants them.
///
/// Blocks of at least [`HUGE_PAGE_BYTES`] start on a huge page boundary. Memory is taken from the system
/// at the first touch, not here.
#[derive(Debug)]
pub struct HostMemory {
    ptr: NonNull<u8>,
    len_bytes: usize,
    placement: Placement,
}

impl HostMemory {
    /// Reserves a block; a length of 0 reserves nothing.
    ///
    /// # Errors
    /// [`AllocateError`] when the system refuses.
    pub fn allocate(len_bytes: usize) -> Result<HostMemory, AllocateError> {
        if len_bytes == 0 {
            let ptr = NonNull::<Page>::dangling().cast();
            return Ok(HostMemory { ptr, len_bytes: 0, placement: Placement::Anywhere });
        }
        let refused = |source: rustix::io::Errno| AllocateError { len_bytes, source: source.into() };
        // A huge page only fits where the address is a multiple of its size: reserve one more, keep the middle.
        let slack = if len_bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let reserved = len_bytes.checked_add(slack).ok_or_else(|| refused(rustix::io::Errno::NOMEM))?;
        let (read_write, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new private mapping at an address the kernel chooses aliases nothing.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, read_write, private) }
            .map_err(refused)?;
        let before = if slack > 0 { start.align_offset(HUGE_PAGE_BYTES) } else { 0 };
        let kept = start.wrapping_byte_add(before);
        unmap(start, before);
        unmap(
            kept.wrapping_byte_add(round_to_page(len_bytes)),
            reserved.saturating_sub(before + round_to_page(len_bytes)),
        );
        if slack > 0 {
            // SAFETY: the range is the mapping made above; this advice changes no contents.
            // A system without huge pages refuses, and ordinary pages serve.
            let _ = unsafe { madvise(kept, len_bytes, Advice::LinuxHugepage) };
        }
        let ptr = NonNull::new(kept.cast()).expect("the kernel maps nothing at address 0");
        Ok(HostMemory { ptr, len_bytes, placement: Placement::Anywhere })
    }

    /// Asks the system for pages of a memory node, before anything touches them; what was touched stays where it is. A copy by a
    /// device from another node's memory crosses the link between the sockets, which several devices share.
    ///
    /// A system that refuses puts them anywhere, and [`placement`](HostMemory::placement) says so: one without such a node, or a container
    /// that forbids the call (Docker's default does without `CAP_SYS_NICE`).
    pub fn near(mut self, node: u32) -> HostMemory {
        if self.len_bytes > 0 {
            self.placement = node::prefer(self.ptr.as_ptr().cast(), round_to_page(self.len_bytes), node);
        }
        self
    }

    /// Returns where the system was asked to put it.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Keeps the memory from children of a fork, which then must not touch it.
    ///
    /// For memory that hardware reads or writes. A fork marks pages copy-on-write; on kernels before 5.10 the parent's next
    /// write to a pinned page goes to a copy, which the hardware does not see. Newer ones copy all of it for the child.
    ///
    /// # Source
    /// Linux, madvise(2), `MADV_DONTFORK`.
    pub fn keep_from_children(&self) {
        if self.len_bytes > 0 {
            // SAFETY: the range is this value's own mapping; this advice changes no contents.
            // A system that does not know it copies as ever.
            let _ = unsafe { madvise(self.ptr.as_ptr().cast(), self.len_bytes, Advice::LinuxDontFork) };
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        unmap(self.ptr.as_ptr().cast(), round_to_page(self.len_bytes));
    }
}

// SAFETY: the mapping is private to this value, zeroed by the kernel, and unmapped only in its drop.
unsafe impl StagingMemory for HostMemory {
    fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

// SAFETY: the promises of the memory inside, which lives at least as long.
unsafe impl<M: StagingMemory> StagingMemory for Arc<M> {
    fn as_ptr(&self) -> NonNull<u8> {
        (**self).as_ptr()
    }

    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }
}

// SAFETY: the value is an address and a length; whoever reads or writes through the address answers for
// the order of those accesses.
unsafe impl Send for HostMemory {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for HostMemory {}

#[repr(align(4096))]
struct Page;

/// Unmaps part of a mapping this module made and no longer hands out.
fn unmap(start: *mut std::ffi::c_void, len_bytes: usize) {
    if len_bytes > 0 {
        // SAFETY: the callers pass page-aligned parts of their own mapping that nothing points into any more.
        let result = unsafe { munmap(start, len_bytes) };
        debug_assert!(result.is_ok(), "munmap of our own mapping: {result:?}");
    }
}

fn round_to_page(len_bytes: usize) -> usize {
    len_bytes.next_multiple_of(rustix::param::page_size())
}

/// The system refused memory.
#[derive(Debug)]
pub struct AllocateError {
    /// Bytes asked for.
    pub len_bytes: usize,
    source: io::Error,
}

impl fmt::Display for AllocateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the system refused {} bytes of host memory", self.len_bytes)
    }
}

impl std::error::Error for AllocateError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The huge page of x86-64, and of aarch64 with 4 KiB base pages.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_zeroed_and_aligned() {
        for len in [0, 1, 4096, 5000, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 77] {
            let memory = HostMemory::allocate(len).unwrap();
            assert_eq!(memory.len_bytes(), len);
            let align = if len >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 4096 };
            assert_eq!(memory.as_ptr().as_ptr().addr() % align, 0, "{len}");
            // SAFETY: the block is `len` initialized bytes that nobody else touches.
            let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().as_ptr(), len) };
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes.fill(1);
        }
    }

    #[test]
    fn what_is_kept_from_children_is_marked_so() {
        let flags = |memory: &HostMemory| {
            let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let start = format!("{:08x}-", memory.as_ptr().as_ptr().addr());
            let of_mapping = text.lines().skip_while(|line| !line.starts_with(&start));
            of_mapping.map(str::to_owned).find(|line| line.starts_with("VmFlags:")).unwrap()
        };
        let memory = HostMemory::allocate(HUGE_PAGE_BYTES + 5000).unwrap();
        memory.keep_from_children();
        assert!(flags(&memory).contains(" dc"), "{}", flags(&memory));
    }

    /// Returns the mapping's policy as the kernel tells it, and where its pages lie: `prefer:0 anon=2 dirty=2 N0=2`.
    fn policy(memory: &HostMemory) -> String {
        let text = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let start = format!("{:08x} ", memory.as_ptr().as_ptr().addr());
        text.lines().find_map(|line| line.strip_prefix(&start)).unwrap().to_owned()
    }

    /// Tells whether this process may say where its memory lies; containers forbid it as a rule.
    fn may_choose_nodes() -> bool {
        let placement = HostMemory::allocate(4096).unwrap().near(0).placement();
        let is_forbidden = matches!(placement, Placement::Refused { errno: libc::EPERM | libc::ENOSYS, .. });
        if is_forbidden {
            println!("skipped: mbind is forbidden here");
        }
        !is_forbidden
    }

    #[test]
    fn pages_come_from_the_node_asked_for() {
        if !may_choose_nodes() {
            return;
        }
        let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap();
        // The last of `0` or `0-1,3`.
        let node: u32 = nodes.trim().rsplit([',', '-']).next().unwrap().parse().unwrap();
        for len_bytes in [5000, HUGE_PAGE_BYTES + 5000] {
            let anywhere = HostMemory::allocate(len_bytes).unwrap();
            assert_eq!(anywhere.placement(), Placement::Anywhere);
            assert!(policy(&anywhere).starts_with("default"), "{}", policy(&anywhere));
            let near = HostMemory::allocate(len_bytes).unwrap().near(node);
            assert_eq!(near.placement(), Placement::Near(node));
            // SAFETY: the block is that long, and nobody else touches it.
            unsafe { near.as_ptr().write_bytes(1, len_bytes) };
            let policy = policy(&near);
            assert!(policy.starts_with(&format!("prefer:{node} ")), "{policy}");
            assert!(policy.contains(&format!(" N{node}=")), "{policy}");
        }
        assert_eq!(HostMemory::allocate(0).unwrap().near(node).placement(), Placement::Anywhere);
    }

    #[test]
    fn a_node_that_is_not_there_leaves_memory_anywhere() {
        if !may_choose_nodes() {
            return;
        }
        for node in [63, 64, 1023, 40_000] {
            let memory = HostMemory::allocate(8192).unwrap().near(node);
            let refused = Placement::Refused { node, errno: libc::EINVAL };
            assert_eq!(memory.placement(), refused);
            assert!(policy(&memory).starts_with("default"), "{}", policy(&memory));
        }
    }

    #[test]
    fn a_refusal_names_the_bytes() {
        let error = HostMemory::allocate(usize::MAX - HUGE_PAGE_BYTES).unwrap_err();
        assert!(error.to_string().contains("bytes of host memory"));
        assert!(std::error::Error::source(&error).is_some());
    }
}
