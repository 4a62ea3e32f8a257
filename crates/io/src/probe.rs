//! What a file allows: direct reads and their alignment, its filesystem, what of it is in the page cache.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use tensorhaul_stage::{HostMemory, StagingMemory};

/// What direct reads of a file need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Offsets, lengths and memory addresses are multiples of this (a power of two).
    pub align_bytes: u64,
}

/// Why a file is not read directly.
#[derive(Debug)]
#[non_exhaustive]
pub enum DirectRefusal {
    /// The filesystem keeps its files in memory; there is nothing to read past.
    InMemory {
        /// Its name.
        filesystem: &'static str,
    },
    /// Opening with `O_DIRECT` failed.
    Open(io::Error),
    /// The filesystem wants a coarser alignment than staging buffers have.
    Alignment {
        /// What it wants.
        needed_bytes: u64,
    },
    /// A first direct read failed.
    Read(io::Error),
    /// A first direct read and an ordinary read of the same bytes differ.
    Mismatch,
}

impl fmt::Display for DirectRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirectRefusal::InMemory { filesystem } => write!(f, "{filesystem} keeps its files in memory"),
            DirectRefusal::Open(error) => write!(f, "opening with O_DIRECT: {error}"),
            DirectRefusal::Alignment { needed_bytes } => {
                write!(
                    f,
                    "direct reads need {needed_bytes}-byte alignment, staging buffers have {ALIGN_BYTES_MAX}"
                )
            }
            DirectRefusal::Read(error) => write!(f, "a first direct read: {error}"),
            DirectRefusal::Mismatch => f.write_str("a first direct read differs from an ordinary one"),
        }
    }
}

/// Opens a file for direct reads and proves them on its first bytes.
pub(crate) fn open_direct(cached: &File, len_bytes: u64) -> Result<(File, Direct), DirectRefusal> {
    if let Some(filesystem @ ("tmpfs" | "ramfs" | "hugetlbfs")) = filesystem(cached) {
        return Err(DirectRefusal::InMemory { filesystem });
    }
    let align_bytes = direct_align(cached);
    if align_bytes > ALIGN_BYTES_MAX {
        return Err(DirectRefusal::Alignment { needed_bytes: align_bytes });
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
    // The path may name another file by now; /proc/self/fd names the one that is open.
    let same = format!("/proc/self/fd/{}", cached.as_raw_fd());
    let open = rustix::fs::open(same.as_str(), flags, Mode::empty());
    let direct = File::from(open.map_err(|errno| DirectRefusal::Open(errno.into()))?);
    prove(&direct, cached, len_bytes, align_bytes)?;
    Ok((direct, Direct { align_bytes }))
}

/// Reads the first block both ways.
fn prove(direct: &File, cached: &File, len_bytes: u64, align_bytes: u64) -> Result<(), DirectRefusal> {
    let block = HostMemory::allocate(align_bytes as usize)
        .map_err(|error| DirectRefusal::Read(io::Error::other(error)))?;
    // SAFETY: the block is ours alone, initialized, and outlives the slice.
    let by_direct = unsafe { std::slice::from_raw_parts_mut(block.as_ptr().as_ptr(), block.len_bytes()) };
    let read =
        rustix::io::pread(direct, &mut *by_direct, 0).map_err(|errno| DirectRefusal::Read(errno.into()))?;
    let expected = len_bytes.min(align_bytes) as usize;
    let mut by_cache = vec![0; expected];
    std::os::unix::fs::FileExt::read_exact_at(cached, &mut by_cache, 0).map_err(DirectRefusal::Read)?;
    if read != expected || by_direct[..expected] != by_cache[..] {
        return Err(DirectRefusal::Mismatch);
    }
    Ok(())
}

/// Returns the alignment that statx reports (Linux 6.1), or one page, which every disk of this century takes.
fn direct_align(file: &File) -> u64 {
    match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align > 0 => {
            u64::from(stat.stx_dio_offset_align.max(stat.stx_dio_mem_align)).next_power_of_two()
        }
        _ => 4096,
    }
}

/// Returns the name of the filesystem an open file is on, if it is one that matters here.
///
/// # Source
/// linux/magic.h; statfs(2).
pub fn filesystem(file: impl AsFd) -> Option<&'static str> {
    let magic = rustix::fs::fstatfs(file).ok()?.f_type as u64 & 0xffff_ffff;
    FILESYSTEMS.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

/// How much of a byte range is in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// Every page is there.
    Hot,
    /// No page is there.
    Cold,
    /// Some pages are there.
    Mixed,
    /// The system cannot tell without reading.
    Unknown,
}

/// Asks how much of a range of a file is in the page cache. Neither waits nor reads anything in.
///
/// mincore(2) would lie: it answers "resident" for files the caller may not write, and "absent" for
/// pages charged to another cgroup.
pub fn residency(file: &File, offset_bytes: u64, len_bytes: u64) -> Residency {
    match cached_bytes(file, offset_bytes, len_bytes) {
        Some(cached) if cached >= len_bytes => Residency::Hot,
        Some(0) => Residency::Cold,
        Some(_) => Residency::Mixed,
        None => sampled(file, offset_bytes, len_bytes),
    }
}

/// Counts the bytes of a range that are in the page cache, in whole pages; `None` where the system
/// cannot count them.
///
/// # Source
/// cachestat(2), Linux 6.5: `struct cachestat_range` and `struct cachestat` of linux/mman.h.
pub fn cached_bytes(file: &File, offset_bytes: u64, len_bytes: u64) -> Option<u64> {
    /// `struct cachestat_range`.
    #[repr(C)]
    struct Range {
        off: u64,
        len: u64,
    }
    /// `struct cachestat`: counts of pages.
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cache: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    if len_bytes == 0 {
        return Some(0); // The system would take a length of 0 as "to the end".
    }
    if filesystem(file) == Some("overlayfs") {
        return None; // It answers for the overlay's own pages; those of the file are the lower filesystem's.
    }
    let (range, mut stat) = (Range { off: offset_bytes, len: len_bytes }, Stat::default());
    // SAFETY: both structs have the kernel's layout and live across the call, which writes only to `stat`.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut stat),
            0,
        )
    };
    let page_bytes = rustix::param::page_size() as u64;
    let pages = (offset_bytes + len_bytes).div_ceil(page_bytes) - offset_bytes / page_bytes;
    match result {
        0 if stat.cache >= pages => Some(len_bytes),
        0 => Some((stat.cache * page_bytes).min(len_bytes)),
        _ => None,
    }
}

/// Asks for one byte of the first, middle and last page, but only if it is there (Linux 4.14).
///
/// This is for kernels before 6.5, and for files that one may read but not write, of which newer ones do not
/// tell. Asking for a page that is not there starts reading it in, and read-ahead would bring more: the question
/// goes through a descriptor of its own that has read-ahead turned off.
///
/// # Source
/// preadv2(2), RWF_NOWAIT.
fn sampled(file: &File, offset_bytes: u64, len_bytes: u64) -> Residency {
    if len_bytes == 0 {
        return Residency::Hot;
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(asking) = rustix::fs::open(path.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
        return Residency::Unknown;
    };
    if rustix::fs::fadvise(&asking, 0, None, rustix::fs::Advice::Random).is_err() {
        return Residency::Unknown;
    }
    let mut hits = 0;
    let places = [offset_bytes, offset_bytes + len_bytes / 2, offset_bytes + len_bytes - 1];
    for place in places {
        let mut byte = [0u8];
        let mut vectors = [rustix::io::IoSliceMut::new(&mut byte)];
        match rustix::io::preadv2(&asking, &mut vectors, place, rustix::io::ReadWriteFlags::NOWAIT) {
            Ok(1) => hits += 1,
            Err(rustix::io::Errno::AGAIN) => {}
            _ => return Residency::Unknown,
        }
    }
    match hits {
        0 => Residency::Cold,
        hits if hits == places.len() => Residency::Hot,
        _ => Residency::Mixed,
    }
}

/// The same number on every architecture, as for all system calls since 2019.
const SYS_CACHESTAT: libc::c_long = 451;

/// Staging buffers and arenas are page-aligned; a filesystem that wants more is read through the page cache.
const ALIGN_BYTES_MAX: u64 = 4096;

const FILESYSTEMS: &[(u64, &str)] = &[
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x2fc1_2fc1, "zfs"),
    (0xf2f5_2010, "f2fs"),
    (0x794c_7630, "overlayfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x9584_58f6, "hugetlbfs"),
    (0x6969, "nfs"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb2"),
    (0x6573_5546, "fuse"),
    (0x0bd0_0bd0, "lustre"),
    (0x00c3_6400, "ceph"),
    (0x7371_7368, "squashfs"),
    (0x0102_1997, "9p"),
];

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_just_written_is_hot_and_an_evicted_one_cold() {
        let mut file = tempfile::tempfile_in(".").unwrap();
        file.write_all(&[1; 100_000]).unwrap();
        file.sync_all().unwrap();
        assert_eq!(residency(&file, 0, 100_000), Residency::Hot);
        assert_eq!(residency(&file, 5000, 0), Residency::Hot);
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert_eq!(residency(&file, 0, 100_000), Residency::Cold);
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        file.read_exact_at(&mut [0; 10], 50_000).unwrap();
        assert_eq!(residency(&file, 0, 100_000), Residency::Mixed);
        assert_eq!(residency(&file, 0, 4096), Residency::Cold);
    }

    #[test]
    fn sampling_agrees_where_it_can_see() {
        let mut file = tempfile::tempfile_in(".").unwrap();
        file.write_all(&[1; 100_000]).unwrap();
        file.sync_all().unwrap();
        assert_eq!(sampled(&file, 0, 100_000), Residency::Hot);
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert_eq!(sampled(&file, 0, 100_000), Residency::Cold);
        // Asking brought in no more than the pages asked for.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(cached_bytes(&file, 0, 100_000).is_none_or(|cached| cached <= 4 * 4096));
    }

    #[test]
    fn files_in_memory_are_not_read_directly() {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        let refusal = open_direct(file.as_file(), 10_000).unwrap_err();
        assert_eq!(refusal.to_string(), "tmpfs keeps its files in memory");
    }
}
