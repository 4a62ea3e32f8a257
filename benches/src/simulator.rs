//! The simulated driver, which benches point the CUDA backend at.

use std::env;
use std::io;
use std::path::PathBuf;

/// Finds its library: cargo puts that of a dependency beside the bench, or in the folder above.
///
/// # Errors
/// When cargo has not built it.
pub fn library() -> io::Result<PathBuf> {
    let bench = env::current_exe()?;
    let folders = bench.ancestors().skip(1).take(2);
    let mut paths = folders.map(|folder| folder.join("libsimgpu.so"));
    paths.find(|path| path.exists()).ok_or_else(|| io::Error::other("cargo bench builds libsimgpu.so first"))
}
