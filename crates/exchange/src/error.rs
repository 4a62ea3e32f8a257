//! Why ranks cannot hand each other their bytes.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tensorhaul_device::DeviceError;
use tensorhaul_device::gpu::table::TableError;

/// Why an exchange failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The vendor's communication library cannot be used.
    Library {
        /// What people call it.
        name: &'static str,
        /// Which variable names another.
        variable: &'static str,
        /// Why.
        source: TableError,
    },
    /// The library is too old to send and receive.
    TooOld {
        /// The library.
        library: PathBuf,
        /// Its version, as it numbers them.
        version: i32,
    },
    /// A call of the library failed.
    Call {
        /// The call.
        call: &'static str,
        /// Its status.
        code: i32,
        /// What the library says of that status.
        text: String,
        /// What it says of this failure, where it does.
        detail: Option<String>,
    },
    /// Another rank failed, ended, or was told to stop.
    PeerLost {
        /// Which, where that is known.
        peer: Option<u32>,
    },
    /// Ranks came with different fingerprints: they load different models, or the same one differently.
    Disagree {
        /// A rank that differs from rank 0.
        peer: u32,
    },
    /// Others did not come in time.
    TimedOut {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
        /// The ranks that were waited for, where that is known.
        missing: Vec<u32>,
    },
    /// Others did not come to the ranks' socket in time.
    NotMet {
        /// Where this rank waited.
        path: PathBuf,
        /// How long.
        after: Duration,
        /// The ranks that were waited for, where that is known.
        missing: Vec<u32>,
    },
    /// The system starts no thread.
    Thread {
        /// What it is needed for.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The ranks' socket cannot be used.
    Socket {
        /// Where it is.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The rank's own device could not copy a message.
    Device(DeviceError),
    /// Somebody answers at the ranks' socket who is of another job.
    Stranger {
        /// Where it is.
        path: PathBuf,
        /// What differs.
        what: String,
    },
}

impl fmt::Display for ExchangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExchangeError::Library { name, variable, .. } => {
                write!(f, "{name} cannot be loaded; install it, or name its library in {variable}")
            }
            ExchangeError::TooOld { library, version } => {
                write!(
                    f,
                    "{} is of version {version}, which cannot send and receive; 2.7 can",
                    library.display()
                )
            }
            ExchangeError::Call { call, code, text, detail } => {
                write!(f, "{call} failed with {code} ({text})")?;
                detail.iter().try_for_each(|detail| write!(f, ": {detail}"))
            }
            ExchangeError::PeerLost { peer: Some(peer) } => {
                write!(f, "rank {peer} of the node failed or ended; its own error says why")
            }
            ExchangeError::PeerLost { peer: None } => {
                write!(f, "another rank of the node failed or ended; its own error says why")
            }
            ExchangeError::Disagree { peer } => {
                write!(
                    f,
                    "rank {peer} of the node loads something else than rank 0: give all ranks the same files, tensors and options"
                )
            }
            ExchangeError::TimedOut { doing, after, missing } => not_come(f, doing, *after, missing),
            ExchangeError::NotMet { path, after, missing } => {
                not_come(f, "meeting", *after, missing)?;
                write!(
                    f,
                    " to {}; all need the same path, which TENSORHAUL_RENDEZVOUS sets, and else TMPDIR and the job",
                    path.display()
                )
            }
            ExchangeError::Thread { doing, .. } => write!(f, "{doing}: no thread could be started for it"),
            ExchangeError::Device(error) => error.fmt(f),
            ExchangeError::Socket { path, doing, .. } => write!(f, "{}: {doing} failed", path.display()),
            ExchangeError::Stranger { path, what } => {
                write!(
                    f,
                    "{}: {what}; give each job a path of its own in TENSORHAUL_RENDEZVOUS",
                    path.display()
                )
            }
        }
    }
}

fn not_come(f: &mut fmt::Formatter<'_>, doing: &str, after: Duration, missing: &[u32]) -> fmt::Result {
    let after = after.as_secs_f64();
    match missing {
        [] => write!(f, "{doing}: not all ranks of the node came within {after} s"),
        [one] => write!(f, "{doing}: rank {one} of the node did not come within {after} s"),
        [first, others @ ..] => {
            write!(f, "{doing}: ranks {first}")?;
            others.iter().try_for_each(|rank| write!(f, ", {rank}"))?;
            write!(f, " of the node did not come within {after} s")
        }
    }
}

impl std::error::Error for ExchangeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ExchangeError::Library { source, .. } => Some(source),
            ExchangeError::Socket { source, .. } | ExchangeError::Thread { source, .. } => Some(source),
            ExchangeError::Device(error) => error.source(),
            _ => None,
        }
    }
}
