//! Files that appear whole or not at all.

use std::error::Error as StdError;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, FallocateFlags, FlockOperation, RenameFlags};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::error::{Error, ErrorKind, Result};

/// A file that is written under a temporary name beside its target. Dropped before [`publish`], it is
/// removed.
///
/// It is created with mode 0666 less the umask, like any file; a name made by `mkstemp` and its kind would
/// leave the target readable by its owner alone.
#[derive(Debug)]
pub(crate) struct NewFile {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    /// Whether the temporary name is gone, because it became the target.
    renamed: bool,
}

/// What a rename does when its target exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It is replaced at once: readers see the old file or the new one.
    Replaced,
    /// It stays, and the rename is an error.
    Kept,
}

impl NewFile {
    /// Creates the temporary file, in the target's folder so that the rename stays on one filesystem, and removes those
    /// that killed writers of the same target left there.
    pub(crate) fn create(target: &Path) -> Result<NewFile> {
        let Some(name) = target.file_name() else {
            return Err(Error::bad_request("names no file to write").in_file(target));
        };
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        remove_abandoned(folder_of(target), &prefix);
        loop {
            let mut hidden = prefix.clone();
            hidden.push(format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
            hidden.push(TEMPORARY_SUFFIX);
            let temporary = folder_of(target).join(hidden);
            let failed = |error| write_error("creating it", target, error);
            let file = OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(failed)?;
            // Shows that its writer lives. Filesystems without locks refuse, and then nobody else takes one either.
            let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            // Somebody may have taken it for abandoned before it was locked.
            if file.metadata().map_err(failed)?.nlink() > 0 {
                return Ok(NewFile { target: target.to_owned(), temporary, file, renamed: false });
            }
        }
    }

    /// Reserves room, so that a full disk is an error now and not after hours of writing.
    pub(crate) fn reserve(&self, len_bytes: u64) -> Result<()> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len_bytes.max(1)) {
            Err(errno @ (Errno::NOSPC | Errno::FBIG | Errno::DQUOT | Errno::IO)) => {
                let what = format!("reserving {len_bytes} bytes for it");
                Err(write_error(what, &self.target, errno.into()))
            }
            // Filesystems that cannot reserve say so in several ways; writing will tell.
            _ => Ok(()),
        }
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| write_error("writing it", &self.target, error))
    }

    /// Waits until the bytes are on storage; called once, after the last write.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.file.sync_all().map_err(|error| write_error("writing it to storage", &self.target, error))
    }

    /// Returns the name it will have in its folder.
    pub(crate) fn name(&self) -> String {
        self.target.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn rename(&mut self, existing: Existing) -> Result<()> {
        let failed = |error: Errno| write_error("giving it its name", &self.target, error.into());
        match existing {
            Existing::Replaced => rustix::fs::rename(&self.temporary, &self.target).map_err(failed)?,
            Existing::Kept => rename_to_new(&self.temporary, &self.target).map_err(failed)?,
        }
        self.renamed = true;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody is left to tell; the name shows what it is.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Gives finished files their names, in this order, then writes their folders' entries to storage.
///
/// # Errors
/// When a name cannot be given; those given to new files before it are taken back.
pub(crate) fn publish(mut files: Vec<NewFile>, existing: Existing) -> Result<()> {
    for place in 0..files.len() {
        if let Err(error) = files[place].rename(existing) {
            if existing == Existing::Kept {
                for renamed in &files[..place] {
                    let _ = fs::remove_file(&renamed.target);
                }
            }
            return Err(error);
        }
    }
    let mut folders: Vec<&Path> = files.iter().map(|file| folder_of(&file.target)).collect();
    folders.sort_unstable();
    folders.dedup();
    folders.into_iter().try_for_each(sync_folder)
}

/// Writes a small file whole, atomically, over whatever has its name.
pub(crate) fn write_file(target: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(target)?;
    file.write(bytes)?;
    file.sync()?;
    publish(vec![file], Existing::Replaced)
}

/// An error of writing to `path`. Unlike a file to be read, one that cannot be created for want of its
/// folder is the caller's mistake, and one that may not be written is the system's refusal.
pub(crate) fn write_error(doing: impl Into<String>, path: &Path, source: io::Error) -> Error {
    let kind = match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            ErrorKind::BadRequest
        }
        _ => ErrorKind::Io,
    };
    Error::new(kind, WriteFailed { doing: doing.into(), source }).in_file(path)
}

/// Removes temporary files of writers that were killed before they could: those that no process here has the number
/// of, and that nobody, here or in another container, has locked.
fn remove_abandoned(folder: &Path, prefix: &OsStr) {
    // Failures leave a file behind, as before; the folder's other errors come up when the new file is created.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let (name, prefix) = (name.as_encoded_bytes(), prefix.as_encoded_bytes());
        let number =
            name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(TEMPORARY_SUFFIX.as_bytes()));
        let writer = number.and_then(writer_of);
        if let Some(writer) = writer
            && rustix::process::test_kill_process(writer) == Err(Errno::SRCH)
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(file) = File::open(entry.path())
            && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Returns the process of `PROCESS-COUNT`.
fn writer_of(number: &[u8]) -> Option<Pid> {
    let (process, count) = std::str::from_utf8(number).ok()?.split_once('-')?;
    count.parse::<u64>().ok()?;
    Pid::from_raw(process.parse().ok()?)
}

fn rename_to_new(from: &Path, to: &Path) -> Result<(), Errno> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every filesystem knows the flag (NFS does not): look first, then rename.
        Err(Errno::INVAL | Errno::NOSYS) if fs::symlink_metadata(to).is_ok() => Err(Errno::EXIST),
        Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::rename(from, to),
        result => result,
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    match synced {
        // Some filesystems have no such thing as syncing a folder.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result.map_err(|error| write_error("writing it to storage", folder, error)),
    }
}

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Something done to a file that the system refused.
#[derive(Debug)]
struct WriteFailed {
    doing: String,
    source: io::Error,
}

impl fmt::Display for WriteFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed", self.doing)
    }
}

impl StdError for WriteFailed {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}

const TEMPORARY_SUFFIX: &str = ".tmp";

/// Tells apart the temporary files of one process.
static COUNTER: AtomicU64 = AtomicU64::new(0);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_has_the_mode_that_the_umask_leaves() {
        let folder = tempfile::tempdir().unwrap();
        write_file(&folder.path().join("ours"), b"x").unwrap();
        fs::write(folder.path().join("plain"), b"x").unwrap();
        let mode = |name| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("ours"), mode("plain"));
    }

    #[test]
    fn a_file_dropped_before_it_is_published_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = NewFile::create(&folder.path().join("a")).unwrap();
        file.write(b"half").unwrap();
        assert_eq!(names(folder.path()).len(), 1);
        drop(file);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn files_of_writers_that_were_killed_are_removed_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        let dead = ended.id();
        ended.wait().unwrap();
        let own = std::process::id();
        let abandoned = format!(".a.{dead}-0.tmp");
        let locked = format!(".a.{dead}-1.tmp");
        let others = [
            format!(".a.{own}-999999.tmp"), // Another thread's.
            format!(".a.b.{dead}-0.tmp"),   // Another target's.
            format!(".a.{dead}.tmp"),
            ".a.x-0.tmp".to_owned(),
            "a".to_owned(),
        ];
        for name in others.iter().chain([&abandoned, &locked]) {
            fs::write(folder.path().join(name), b"half").unwrap();
        }
        // As by a writer in a container of its own, whose process nobody sees here.
        let writer = File::open(folder.path().join(&locked)).unwrap();
        rustix::fs::flock(&writer, FlockOperation::NonBlockingLockExclusive).unwrap();
        write_file(&folder.path().join("a"), b"whole").unwrap();
        let mut expected: Vec<_> = others.into_iter().chain([locked]).collect();
        expected.sort();
        assert_eq!(names(folder.path()), expected);
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"whole");
    }

    #[test]
    fn a_name_that_is_taken_undoes_the_names_before_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b"), b"old").unwrap();
        let new = |name: &str| NewFile::create(&folder.path().join(name)).unwrap();
        let error = publish(vec![new("a"), new("b"), new("c")], Existing::Kept).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest, "{error:?}");
        assert_eq!(names(folder.path()), ["b"]);
        assert_eq!(fs::read(folder.path().join("b")).unwrap(), b"old");
    }

    #[test]
    fn a_missing_folder_is_the_callers_mistake_and_a_full_disk_is_not() {
        let error = write_file(Path::new("/nowhere/at/all"), b"").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        let full = write_error("writing it", Path::new("a"), io::ErrorKind::StorageFull.into());
        assert_eq!(full.kind(), ErrorKind::Io);
    }
}
