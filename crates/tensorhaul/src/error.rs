//! The one error type of the public API: what happened, where, and whose move it is.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tensorhaul_device::DeviceError;
use tensorhaul_io::file::OpenCause;
use tensorhaul_io::{OpenError, ReadCause, ReadError};
use tensorhaul_plan::checkpoint::CheckpointError;
use tensorhaul_plan::{DeviceId, DeviceMapError, HeaderError, IndexError, PlanError};
use tensorhaul_stage::LayoutError;

/// Why a call failed.
///
/// `Display` prints this link of the chain alone; [`source`](StdError::source) gives the next. The error
/// knows, where there is one, the file, the tensor and the bytes it is about.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    file: Option<PathBuf>,
    tensor: Option<String>,
    bytes: Option<Range<u64>>,
    what: Box<dyn StdError + Send + Sync>,
    /// Whether the text of `what` already begins with the file.
    names_file: bool,
    /// What would work, where `what` cannot know it.
    remedy: Option<&'static str>,
}

/// Whose move it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such file or model, or it may not be read: name another, or change its permissions.
    NotFound,
    /// A file is not what it claims to be: get it again.
    Malformed,
    /// A valid input that this version does not handle.
    Unsupported,
    /// The caller asked for something impossible: the text says what would work.
    BadRequest,
    /// The system failed to read or write.
    Io,
    /// A device or its driver failed.
    Device,
    /// Host or device memory, or a budget, does not suffice.
    OutOfMemory,
    /// The caller cancelled the load.
    Cancelled,
}

/// The result of a call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, what: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        let what = what.into();
        Error(Box::new(Inner {
            kind,
            file: None,
            tensor: None,
            bytes: None,
            what,
            names_file: false,
            remedy: None,
        }))
    }

    pub(crate) fn bad_request(what: impl Into<String>) -> Error {
        Error::new(ErrorKind::BadRequest, what.into())
    }

    /// The system's error about a file, with what was being done to it.
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Error {
        Error::new(kind_of(&source), Failed { doing, source }).in_file(path)
    }

    pub(crate) fn cancelled() -> Error {
        Error::new(ErrorKind::Cancelled, "the load was cancelled")
    }

    pub(crate) fn in_file(mut self, path: impl Into<PathBuf>) -> Error {
        self.0.file = Some(path.into());
        self
    }

    /// Says which file it is about, where the text names it already.
    pub(crate) fn about_file(mut self, path: impl Into<PathBuf>) -> Error {
        (self.0.file, self.0.names_file) = (Some(path.into()), true);
        self
    }

    pub(crate) fn about_tensor(mut self, name: impl Into<String>) -> Error {
        self.0.tensor = Some(name.into());
        self
    }

    pub(crate) fn header(error: HeaderError, path: &Path) -> Error {
        let (tensor, bytes) = (error.tensor().map(str::to_owned), error.bytes());
        let mut wrapped = Error::new(ErrorKind::Malformed, error).in_file(path);
        wrapped.0.tensor = tensor;
        wrapped.0.bytes = bytes.map(|(begin, end)| begin..end);
        wrapped
    }

    pub(crate) fn index(error: IndexError, path: &Path) -> Error {
        let tensor = error.tensor().map(str::to_owned);
        let mut wrapped = Error::new(ErrorKind::Malformed, error).in_file(path);
        wrapped.0.tensor = tensor;
        wrapped
    }

    pub(crate) fn read(error: ReadError, path: &Path, tensor: Option<&str>) -> Error {
        let kind = match (&error.cause, device_error(&error)) {
            (ReadCause::End { .. }, _) => ErrorKind::Malformed,
            (_, Some(failed)) => kind_of_device(failed),
            _ => ErrorKind::Io,
        };
        let bytes = error.extent.offset_bytes..error.extent.end_bytes();
        let mut wrapped = Error::new(kind, error).in_file(path);
        wrapped.0.tensor = tensor.map(str::to_owned);
        wrapped.0.bytes = Some(bytes);
        wrapped
    }

    /// Says what would work, behind what happened.
    pub(crate) fn with_remedy(mut self, remedy: &'static str) -> Error {
        self.0.remedy = Some(remedy);
        self
    }

    /// Returns whose move it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the file at fault.
    pub fn file(&self) -> Option<&Path> {
        self.0.file.as_deref()
    }

    /// Returns the tensor at fault.
    pub fn tensor(&self) -> Option<&str> {
        self.0.tensor.as_deref()
    }

    /// Returns the device at fault.
    pub fn device(&self) -> Option<DeviceId> {
        self.device_error().and_then(DeviceError::device)
    }

    /// Tells whether a device that is there failed, and not that there is none.
    #[cfg(feature = "conformance")]
    pub(crate) fn is_of_device_there(&self) -> bool {
        self.device_error().is_some_and(|error| !matches!(error, DeviceError::Unavailable { .. }))
    }

    fn device_error(&self) -> Option<&DeviceError> {
        let what = &self.0.what;
        let read = || what.downcast_ref().and_then(device_error);
        what.downcast_ref().or_else(read)
    }

    /// Returns the bytes of the file at fault, counted from its start.
    pub fn bytes(&self) -> Option<Range<u64>> {
        self.0.bytes.clone()
    }

    /// Returns the text of every link of the chain, on one line.
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut next = self.source();
        while let Some(link) = next {
            line = format!("{line}: {link}");
            next = link.source();
        }
        line.replace('\n', " ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = self.0.what.to_string();
        if let Some(file) = self.file().filter(|_| !self.0.names_file) {
            write!(f, "{}: ", file.display())?;
        }
        // Not every link can know its tensor; those that do say so themselves.
        if let Some(tensor) = self.tensor().filter(|tensor| !what.contains(&format!("{tensor:?}"))) {
            write!(f, "tensor {tensor:?}: ")?;
        }
        f.write_str(&what)?;
        self.0.remedy.map_or(Ok(()), |remedy| write!(f, " ({remedy})"))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind(), self.one_line())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.what.source()
    }
}

impl From<OpenError> for Error {
    fn from(error: OpenError) -> Error {
        let kind = match &error.cause {
            OpenCause::Io(source) => kind_of(source),
            OpenCause::NotAFile(_) => ErrorKind::NotFound,
            _ => ErrorKind::Malformed,
        };
        let path = error.path.clone();
        let mut wrapped = Error::new(kind, error).in_file(path);
        wrapped.0.names_file = true;
        wrapped
    }
}

impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Error {
        let tensor = error.tensor().map(str::to_owned);
        let mut wrapped = Error::new(ErrorKind::Malformed, error);
        wrapped.0.tensor = tensor;
        wrapped
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Error {
        let tensor = error.tensor().map(str::to_owned);
        let kind = match error {
            PlanError::OverBudget { .. } | PlanError::OverTransientBudget { .. } => ErrorKind::OutOfMemory,
            _ => ErrorKind::BadRequest,
        };
        let mut wrapped = Error::new(kind, error);
        wrapped.0.tensor = tensor;
        wrapped
    }
}

impl From<DeviceMapError> for Error {
    fn from(error: DeviceMapError) -> Error {
        let kind = match error {
            DeviceMapError::DoesNotFit { .. } => ErrorKind::OutOfMemory,
            _ => ErrorKind::BadRequest,
        };
        Error::new(kind, error)
    }
}

impl From<LayoutError> for Error {
    fn from(error: LayoutError) -> Error {
        Error::new(ErrorKind::BadRequest, error)
    }
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Error {
        Error::new(kind_of_device(&error), error)
    }
}

/// Something done to a file that the system refused.
#[derive(Debug)]
struct Failed {
    doing: &'static str,
    source: io::Error,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed", self.doing)
    }
}

impl StdError for Failed {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}

/// Returns the device's own error, where that ended a read.
fn device_error(error: &ReadError) -> Option<&DeviceError> {
    match &error.cause {
        ReadCause::Library(cause) => cause.downcast_ref(),
        _ => None,
    }
}

fn kind_of_device(error: &DeviceError) -> ErrorKind {
    match error {
        DeviceError::OutOfMemory { .. }
        | DeviceError::TooSmall { .. }
        | DeviceError::OutOfHostMemory { .. } => ErrorKind::OutOfMemory,
        _ => ErrorKind::Device,
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory => {
            ErrorKind::NotFound
        }
        io::ErrorKind::OutOfMemory => ErrorKind::OutOfMemory,
        _ => ErrorKind::Io,
    }
}
