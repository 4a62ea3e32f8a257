//! What keeps a quantized tensor from being understood.

use std::fmt;

use crate::dtype::Dtype;
use crate::header::json::Quoted;

/// What keeps a configuration or a quantized tensor from being understood.
///
/// Every variant names the file and key, or the tensor, says what was found, and what would fit.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum QuantError {
    /// A configuration is longer than any real one.
    ConfigTooLong {
        /// The file.
        file: String,
        /// Its length.
        len_bytes: u64,
        /// The limit.
        len_bytes_max: u64,
    },
    /// A configuration is not JSON, or nested too deeply.
    ConfigJson {
        /// The file, or the file and key of a text inside another.
        file: String,
        /// Where the parser stopped.
        at_bytes: u64,
        /// What it said.
        message: String,
    },
    /// A key of a configuration has a value that makes no sense there.
    ConfigValue {
        /// The file.
        file: String,
        /// The key, with those it is nested in.
        key: String,
        /// What is there.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// A tensor lacks one that it needs; it may lie in a file that was not opened.
    Missing {
        /// The tensor that is there.
        tensor: String,
        /// The one that is not.
        missing: String,
        /// What it is for.
        what: &'static str,
    },
    /// A tensor has a dtype that its format does not have.
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: Dtype,
        /// What would fit.
        expected: String,
    },
    /// A tensor's shape does not fit the others' or the configuration.
    WrongShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<u64>,
        /// What would fit.
        expected: String,
    },
    /// The bytes of a small tensor do not say what they should.
    WrongValue {
        /// The tensor.
        tensor: String,
        /// What it holds.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// The configuration and the tensors say different things.
    Contradiction {
        /// The tensor.
        tensor: String,
        /// What the configuration says, with its file and key.
        config: String,
        /// What the tensors say.
        found: String,
    },
    /// A module that the configuration excludes holds quantized tensors.
    Excluded {
        /// The quantized tensor.
        tensor: String,
        /// The file and key of the exclusion.
        config: String,
        /// The pattern that matches.
        pattern: String,
    },
    /// The tensors alone fit several formats.
    Ambiguous {
        /// The tensor.
        tensor: String,
        /// What it may be.
        readings: String,
        /// The key of a configuration that would decide.
        key: String,
    },
    /// A format that can be loaded as stored, but not dequantized.
    Unsupported {
        /// The format.
        family: String,
        /// The first tensor of it; `None` where only the configuration names it.
        tensor: Option<String>,
        /// What of it is not supported.
        what: String,
    },
    /// The bytes of a small tensor were asked for and not given.
    NotRead {
        /// The tensor.
        tensor: String,
    },
}

impl QuantError {
    /// Returns the tensor at fault, if it is one.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            QuantError::ConfigTooLong { .. }
            | QuantError::ConfigJson { .. }
            | QuantError::ConfigValue { .. } => None,
            QuantError::Missing { tensor, .. }
            | QuantError::WrongDtype { tensor, .. }
            | QuantError::WrongShape { tensor, .. }
            | QuantError::WrongValue { tensor, .. }
            | QuantError::Contradiction { tensor, .. }
            | QuantError::Excluded { tensor, .. }
            | QuantError::Ambiguous { tensor, .. }
            | QuantError::NotRead { tensor } => Some(tensor),
            QuantError::Unsupported { tensor, .. } => tensor.as_deref(),
        }
    }

    /// Tells whether the format is known and not supported, rather than the files wrong.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, QuantError::Unsupported { .. })
    }
}

impl fmt::Display for QuantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QuantError::ConfigTooLong { file, len_bytes, len_bytes_max } => {
                write!(f, "{file}: {len_bytes} bytes, at most {len_bytes_max} are read")
            }
            QuantError::ConfigJson { file, at_bytes, message } => {
                write!(f, "{file}: byte {at_bytes}: {message}")
            }
            QuantError::ConfigValue { file, key, found, expected } => {
                write!(f, "{file}: {key} is {}; {expected} would fit", Short(found))
            }
            QuantError::Missing { tensor, missing, what } => write!(
                f,
                "tensor {}: needs {} ({what}), which is in none of the opened files",
                Quoted(tensor),
                Quoted(missing)
            ),
            QuantError::WrongDtype { tensor, found, expected } => {
                write!(f, "tensor {}: dtype {found}; {expected} would fit", Quoted(tensor))
            }
            QuantError::WrongShape { tensor, found, expected } => {
                write!(f, "tensor {}: shape {found:?}; {expected} would fit", Quoted(tensor))
            }
            QuantError::WrongValue { tensor, found, expected } => {
                write!(f, "tensor {}: holds {}; {expected} would fit", Quoted(tensor), Short(found))
            }
            QuantError::Contradiction { tensor, config, found } => {
                write!(f, "tensor {}: {config}, but {found}", Quoted(tensor))
            }
            QuantError::Excluded { tensor, config, pattern } => write!(
                f,
                "tensor {}: {config} excludes its module by {}, but it is quantized",
                Quoted(tensor),
                Quoted(pattern)
            ),
            QuantError::Ambiguous { tensor, readings, key } => {
                write!(f, "tensor {}: may be {readings}; {key} would decide", Quoted(tensor))
            }
            QuantError::Unsupported { family, tensor, what } => {
                if let Some(tensor) = tensor {
                    write!(f, "tensor {}: ", Quoted(tensor))?;
                }
                write!(f, "{}: {what} cannot be dequantized; loading as stored works", Short(family))
            }
            QuantError::NotRead { tensor } => {
                write!(f, "tensor {}: its bytes are needed to recognise its format", Quoted(tensor))
            }
        }
    }
}

impl std::error::Error for QuantError {}

/// A text from a file without its quotes, escaped and shortened to what a line bears.
struct Short<'a>(&'a str);

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for char in self.0.chars().take(SHORT_LEN_CHARS_MAX) {
            match char.is_control() {
                true => write!(f, "{}", char.escape_default())?,
                false => write!(f, "{char}")?,
            }
        }
        if self.0.chars().nth(SHORT_LEN_CHARS_MAX).is_some() { f.write_str("...") } else { Ok(()) }
    }
}

const SHORT_LEN_CHARS_MAX: usize = 200;
