//! Tables of functions from a library that is loaded at run time.

use std::ffi::{CStr, OsStr, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::NoDriver;

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

impl TableError {
    /// Makes it the reason why a vendor has no driver; `cause` is likely where no library was found.
    pub fn no_driver(&self, cause: &str) -> NoDriver {
        match self {
            TableError::NoLibrary { .. } => NoDriver::Missing(format!("{self}; {cause}")),
            TableError::MissingSymbol { .. } => NoDriver::Fails(self.to_string()),
        }
    }
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

/// Returns a library that this process has loaded already, with its path; `stem` is how its file's name begins, as
/// in `libamdhip64.so`. Of a library that keeps state, a second copy would know nothing of the first one's.
pub fn held(stem: &str) -> Option<(libloading::Library, PathBuf)> {
    let path = held_path(stem)?;
    // SAFETY: the library is in the process already, so that nothing of it is run.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NOLOAD) }.ok()?;
    Some((library.into(), path))
}

/// Returns the path of a library in this process.
fn held_path(stem: &str) -> Option<PathBuf> {
    struct Search<'s> {
        stem: &'s str,
        found: Option<PathBuf>,
    }

    unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _len: usize, search: *mut c_void) -> c_int {
        // SAFETY: the loader passes what describes one library, for the time of this call.
        let name = unsafe { (*info).dlpi_name };
        // SAFETY: the search given below, which nobody else touches meanwhile.
        let search = unsafe { &mut *search.cast::<Search<'_>>() };
        if name.is_null() {
            return 0;
        }
        // SAFETY: terminated, and the loader's own for the time of this call.
        let path = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()));
        let is_it = path.file_name().is_some_and(|file| file.as_bytes().starts_with(search.stem.as_bytes()));
        if is_it {
            search.found = Some(path.to_owned());
        }
        c_int::from(is_it)
    }

    let mut search = Search { stem, found: None };
    // SAFETY: the function takes what is given, and neither loads nor unloads a library.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found
}

/// Declares a struct of function pointers and its loader: required functions, then optional ones, which
/// older drivers lack and which are `None` there.
///
/// A function returns the driver's status as an `i32` where nothing else is said.
#[macro_export]
macro_rules! driver_table {
    (@returned) => { i32 };
    (@returned $returned:ty) => { $returned };
    (
        $(#[$doc:meta])*
        $visibility:vis struct $name:ident {
            $(fn $required:ident($($argument:ty),* $(,)?) $(-> $returned:ty)?;)*
            optional:
            $(fn $optional:ident($($optional_argument:ty),* $(,)?) $(-> $optional_returned:ty)?;)*
        }
    ) => {
        $(#[$doc])*
        #[allow(non_snake_case, reason = "the driver's own names")]
        $visibility struct $name {
            $(pub(crate) $required: unsafe extern "C" fn($($argument),*) -> $crate::driver_table!(@returned $($returned)?),)*
            $(pub(crate) $optional: Option<
                unsafe extern "C" fn($($optional_argument),*) -> $crate::driver_table!(@returned $($optional_returned)?),
            >,)*
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

            /// Looks the functions up in a library that is loaded.
            pub(crate) fn look_up(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_loaded_is_found_and_another_is_not() {
        let (_library, path) = held("libc.so").unwrap();
        assert!(path.is_absolute(), "{}", path.display());
        assert!(held("libamdhip64.so").is_none());
    }
}
