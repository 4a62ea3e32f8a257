//! Open files: what was found at open, and whether it is still so.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use crate::probe::{self, Direct, DirectRefusal};

/// A regular file, open for reading, as long as it was when it was opened.
#[derive(Debug)]
pub struct OpenFile {
    path: PathBuf,
    cached: File,
    direct: OnceLock<Result<(File, Direct), DirectRefusal>>,
    seen: Seen,
}

/// What tells that a file was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    len_bytes: u64,
    modified: (i64, i64),
}

impl OpenFile {
    /// Opens a regular file. A FIFO or device is refused at once, never waited for.
    ///
    /// # Errors
    /// [`OpenError`] naming the path and what is there instead, or the system's error.
    pub fn open(path: &Path) -> Result<OpenFile, OpenError> {
        let failed = |source: io::Error| OpenError { path: path.to_owned(), cause: OpenCause::Io(source) };
        // Without O_NONBLOCK, opening a FIFO waits for a writer. Regular files ignore the flag.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let cached =
            File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?);
        let metadata = cached.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(OpenError {
                path: path.to_owned(),
                cause: OpenCause::NotAFile(describe(metadata.file_type())),
            });
        }
        let seen = Seen::of(&metadata);
        Ok(OpenFile { path: path.to_owned(), cached, direct: OnceLock::new(), seen })
    }

    /// Finds out, by use and once, whether the file can be read directly; keeps it open for that.
    ///
    /// # Errors
    /// Why it cannot: the loader then reads it through the page cache and reports this reason.
    pub fn probe_direct(&self) -> Result<Direct, &DirectRefusal> {
        let probed = self.direct.get_or_init(|| probe::open_direct(&self.cached, self.seen.len_bytes));
        probed.as_ref().map(|(_, direct)| *direct)
    }

    /// Returns the path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the length it had when it was opened.
    pub fn len_bytes(&self) -> u64 {
        self.seen.len_bytes
    }

    /// Returns the descriptor that reads through the page cache.
    pub fn cached(&self) -> &File {
        &self.cached
    }

    /// Returns the descriptor that reads past the page cache and what such reads need, once
    /// [`probe_direct`](OpenFile::probe_direct) has shown that they work.
    pub fn direct(&self) -> Option<(BorrowedFd<'_>, Direct)> {
        let (file, direct) = self.direct.get()?.as_ref().ok()?;
        Some((file.as_fd(), *direct))
    }

    /// Checks that nobody wrote to the file since it was opened.
    ///
    /// # Errors
    /// [`OpenError`] with the lengths then and now.
    pub fn check_unchanged(&self) -> Result<(), OpenError> {
        let cause = match self.cached.metadata() {
            Ok(metadata) if Seen::of(&metadata) == self.seen => return Ok(()),
            Ok(metadata) => OpenCause::Changed { then_bytes: self.seen.len_bytes, now_bytes: metadata.len() },
            Err(error) => OpenCause::Io(error),
        };
        Err(OpenError { path: self.path.clone(), cause })
    }
}

impl Seen {
    fn of(metadata: &std::fs::Metadata) -> Seen {
        use std::os::unix::fs::MetadataExt;
        Seen { len_bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

fn describe(kind: std::fs::FileType) -> &'static str {
    match kind {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_block_device() => "a block device",
        kind if kind.is_char_device() => "a character device",
        _ => "no regular file",
    }
}

/// A file that cannot be opened, or is no longer what was opened.
#[derive(Debug)]
pub struct OpenError {
    /// The path given.
    pub path: PathBuf,
    /// What is wrong with it.
    pub cause: OpenCause,
}

/// What is wrong with a file.
#[derive(Debug)]
#[non_exhaustive]
pub enum OpenCause {
    /// The system reported an error.
    Io(io::Error),
    /// Something else is there.
    NotAFile(&'static str),
    /// Somebody wrote to it while it was being loaded.
    Changed {
        /// Its length when it was opened.
        then_bytes: u64,
        /// Its length now.
        now_bytes: u64,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.cause {
            OpenCause::Io(_) => write!(f, "{path}: cannot be opened"),
            OpenCause::NotAFile(found) => write!(f, "{path}: is {found}, not a regular file"),
            OpenCause::Changed { then_bytes, now_bytes } if then_bytes == now_bytes => {
                write!(f, "{path}: was written to while it was read ({now_bytes} bytes)")
            }
            OpenCause::Changed { then_bytes, now_bytes } => {
                write!(
                    f,
                    "{path}: was written to while it was read: {then_bytes} bytes when it was opened, {now_bytes} now"
                )
            }
        }
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            OpenCause::Io(error) => Some(error),
            _ => None,
        }
    }
}
