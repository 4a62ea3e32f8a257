//! How files can be read where checkpoints are.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use tensorhaul_io::{OpenFile, probe};

use super::Advice;
use crate::error::{Error, Result};
use crate::locate::cache_folder;

/// A folder, or a file, that checkpoints are read from.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Folder {
    /// Its path.
    pub path: String,
    /// What it is to the loader.
    pub role: &'static str,
    /// Where its filesystem is mounted.
    pub mount: Option<String>,
    /// The filesystem it is on, where it is one that matters here.
    pub filesystem: Option<&'static str>,
    /// What offsets, lengths and addresses of direct reads are multiples of; `None` where there are none.
    pub direct_align_bytes: Option<u64>,
    /// Why files here are not read directly, or why nothing is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Returns the folders that are looked into when nothing is said.
pub(super) fn usual() -> Vec<Folder> {
    let current = env::current_dir().ok().map(|path| examine(&path, "current folder"));
    let cache = cache_folder().map(|path| examine(&path, "Hugging Face cache"));
    current.into_iter().chain(cache).collect()
}

/// Examines what the caller names.
pub(super) fn given(paths: &[PathBuf]) -> Result<Vec<Folder>> {
    let examine = |path: &PathBuf| match fs::metadata(path) {
        Ok(_) => Ok(examine(path, GIVEN)),
        Err(error) => Err(Error::io("looking at it", path, error)),
    };
    paths.iter().map(examine).collect()
}

impl Folder {
    /// Where the caller means to read from and cannot read directly, that is worth a word.
    pub(super) fn advise(&self) -> Option<Advice> {
        let why = self.why.as_ref().filter(|_| self.role == GIVEN)?;
        Some(Advice {
            what: format!("{}: cold files are read through the page cache, not past it ({why})", self.path),
            remedy: "keep checkpoints on a local filesystem that has O_DIRECT, such as ext4 or xfs"
                .to_owned(),
        })
    }
}

fn examine(path: &Path, role: &'static str) -> Folder {
    let (direct_align_bytes, why) = match direct_align(path) {
        Ok(align_bytes) => (Some(align_bytes), None),
        Err(why) => (None, Some(why)),
    };
    Folder {
        path: path.to_string_lossy().into_owned(),
        role,
        mount: mount(path),
        filesystem: File::open(path).ok().and_then(probe::filesystem),
        direct_align_bytes,
        why,
    }
}

/// Returns the longest mount point above a path.
fn mount(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(unescape);
    points.filter(|point| path.starts_with(point)).max_by_key(String::len)
}

/// Undoes what the kernel does to spaces, tabs and backslashes in names.
///
/// # Source
/// getmntent(3).
fn unescape(name: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(name.to_owned(), |name, (escaped, plain)| name.replace(escaped, plain))
}

fn direct_align(path: &Path) -> Result<u64, String> {
    let file = sample(path)?;
    let direct = file.probe_direct().map_err(ToString::to_string)?;
    Ok(direct.align_bytes)
}

/// Opens a file to try reads on: the file itself, or of a folder a nameless one, or where none can be made, the first that is there.
pub(super) fn sample(path: &Path) -> Result<OpenFile, String> {
    let nameless = nameless_file(path);
    let path = match &nameless {
        _ if path.is_file() => path.to_owned(),
        _ if !path.is_dir() => return Err("there is no such folder".to_owned()),
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        None => first_file(path).ok_or("it cannot be written to, and holds no file to try")?,
    };
    OpenFile::open(&path).map_err(|error| error.to_string())
}

/// A page in a file that vanishes when it is closed.
pub(super) fn nameless_file(folder: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR).ok()?);
    file.write_all(&[0; 4096]).ok()?;
    Some(file)
}

fn first_file(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.take(ENTRIES_MAX).flatten();
    entries
        .map(|entry| entry.path())
        .find(|path| path.metadata().is_ok_and(|file| file.is_file() && file.len() > 0))
}

const GIVEN: &str = "given";

/// A folder without a file among so many entries is not searched further.
const ENTRIES_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_in_memory_and_missing_ones_say_why() {
        let memory = &given(&["/dev/shm".into()]).unwrap()[0];
        assert_eq!((memory.filesystem, memory.mount.as_deref()), (Some("tmpfs"), Some("/dev/shm")));
        assert!(memory.why.as_ref().unwrap().contains("in memory"));
        assert!(memory.advise().unwrap().what.starts_with("/dev/shm: "));
        let nowhere = examine(Path::new("/nowhere"), "test");
        assert_eq!(nowhere.why.as_deref(), Some("there is no such folder"));
        assert!(given(&["/nowhere".into()]).unwrap_err().one_line().contains("/nowhere"));
    }

    #[test]
    fn a_file_is_tried_itself() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let (file, folder) = (examine(&file, "test"), examine(file.parent().unwrap(), "test"));
        assert_eq!((file.direct_align_bytes, &file.mount), (folder.direct_align_bytes, &folder.mount));
    }

    #[test]
    fn names_of_mounts_are_read_as_they_are() {
        assert_eq!(unescape("/mnt/my\\040models"), "/mnt/my models");
    }
}
