//! Where the ranks of a node look for each other: a path that follows from the job.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::error::ExchangeError;
use crate::launch::Launched;

/// Where and how long the ranks of a node look for each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// The socket's path, the same on all ranks.
    pub path: PathBuf,
    /// How long a rank waits for the others, then and later. Default: 5 minutes, because ranks come when their process has imported what
    /// it imports.
    pub timeout: Duration,
}

impl Rendezvous {
    /// How long ranks wait where nobody says otherwise.
    pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);

    /// Returns the place of a job: what [`RENDEZVOUS_VARIABLE`] says, else a name made of the job in a folder that only this user
    /// enters.
    ///
    /// # Errors
    /// [`ExchangeError::Socket`] when the folder cannot be made, [`ExchangeError::Stranger`] when it is somebody else's.
    pub fn of(launched: &Launched) -> Result<Rendezvous, ExchangeError> {
        let path = match std::env::var_os(RENDEZVOUS_VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => path.into(),
            None => own_folder()?.join(file_name(&launched.job)),
        };
        Ok(Rendezvous { path, timeout: Rendezvous::TIMEOUT_DEFAULT })
    }
}

/// Makes the folder of this user's sockets, in the place that all processes of the user share.
fn own_folder() -> Result<PathBuf, ExchangeError> {
    let user = rustix::process::geteuid().as_raw();
    let path = std::env::temp_dir().join(format!("tensorhaul-{user}"));
    let failed = |source| ExchangeError::Socket { path: path.clone(), doing: "making the folder", source };
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = fs::symlink_metadata(&path).map_err(failed)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        let what = "it is no folder that this user alone may enter".to_owned();
        return Err(ExchangeError::Stranger { path, what });
    }
    Ok(path)
}

/// Makes a file name of a job: sockets have paths of at most 108 bytes, so that the rest of a long one becomes a number.
fn file_name(job: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let plain: String =
        job.bytes().map(|byte| if is_plain(byte) { byte as char } else { '_' }).take(40).collect();
    format!("{plain}-{:016x}.sock", hash(job.as_bytes()))
}

/// # Source
/// Fowler, Noll, Vo: FNV-1a, 64 bits.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Names another path for the ranks' socket, the same on all ranks of a node.
pub const RENDEZVOUS_VARIABLE: &str = "TENSORHAUL_RENDEZVOUS";
