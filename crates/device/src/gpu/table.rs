//! Tables of functions from a library that is loaded at run time.

use std::fmt;
use std::path::PathBuf;

/// Why a driver library cannot be used. Names what was tried, so that the user can see what is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// No library of these names could be loaded.
    NoLibrary {
        /// Each name tried, and the loader's answer.
        tried: Vec<(PathBuf, String)>,
    },
    /// A library was loaded, but lacks a function that is required.
    MissingSymbol {
        /// The library.
        library: PathBuf,
        /// The function.
        symbol: &'static str,
    },
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TableError::NoLibrary { tried } => {
                let names: Vec<_> = tried.iter().map(|(path, _)| path.display().to_string()).collect();
                write!(f, "no driver library found (tried {})", names.join(", "))?;
                match tried.iter().find(|(_, answer)| !answer.contains("No such file")) {
                    Some((path, answer)) => write!(f, "; {}: {answer}", path.display()),
                    None => Ok(()),
                }
            }
            TableError::MissingSymbol { library, symbol } => {
                write!(
                    f,
                    "{} lacks {symbol}; the driver is too old, or the library is broken",
                    library.display()
                )
            }
        }
    }
}

impl std::error::Error for TableError {}

/// Returns what the loader said, which is the innermost of its errors.
#[doc(hidden)]
pub fn answer(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Declares a struct of function pointers and its loader: required functions, then optional ones, which
/// older drivers lack and which are `None` there.
///
/// Every function returns the driver's status as an `i32`.
#[macro_export]
macro_rules! driver_table {
    (
        $(#[$doc:meta])*
        $visibility:vis struct $name:ident {
            $(fn $required:ident($($argument:ty),* $(,)?);)*
            optional:
            $(fn $optional:ident($($optional_argument:ty),* $(,)?);)*
        }
    ) => {
        $(#[$doc])*
        #[allow(non_snake_case, reason = "the driver's own names")]
        $visibility struct $name {
            $(pub(crate) $required: unsafe extern "C" fn($($argument),*) -> i32,)*
            $(pub(crate) $optional: Option<unsafe extern "C" fn($($optional_argument),*) -> i32>,)*
            pub(crate) path: std::path::PathBuf,
            /// Keeps the functions mapped.
            _library: libloading::Library,
        }

        impl $name {
            /// Loads the first of these libraries that exists, and looks its functions up.
            pub(crate) fn load(
                candidates: &[std::path::PathBuf],
            ) -> Result<$name, $crate::gpu::table::TableError> {
                let mut tried = Vec::new();
                for path in candidates {
                    // SAFETY: these are the names of the vendor's driver, or a path the user gave for it;
                    // loading it runs its initializers, which is what using a driver means.
                    match unsafe { libloading::Library::new(path) } {
                        Ok(library) => return $name::look_up(library, path),
                        Err(error) => tried.push((path.clone(), $crate::gpu::table::answer(&error))),
                    }
                }
                Err($crate::gpu::table::TableError::NoLibrary { tried })
            }

            fn look_up(
                library: libloading::Library,
                path: &std::path::Path,
            ) -> Result<$name, $crate::gpu::table::TableError> {
                $(
                    #[allow(non_snake_case, reason = "the driver's own names")]
                    // SAFETY: the vendor documents this function with this signature, stable across versions.
                    let $required = match unsafe { library.get(concat!(stringify!($required), "\0")) } {
                        Ok(symbol) => *symbol,
                        Err(_) => {
                            return Err($crate::gpu::table::TableError::MissingSymbol {
                                library: path.to_owned(),
                                symbol: stringify!($required),
                            });
                        }
                    };
                )*
                $(
                    #[allow(non_snake_case, reason = "the driver's own names")]
                    // SAFETY: as above.
                    let $optional = unsafe { library.get(concat!(stringify!($optional), "\0")) }.ok().map(|symbol| *symbol);
                )*
                Ok($name { $($required,)* $($optional,)* path: path.to_owned(), _library: library })
            }
        }
    };
}
