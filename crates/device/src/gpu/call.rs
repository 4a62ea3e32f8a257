//! What the calls of every vendor's driver have in common.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use super::CallError;

/// Makes a handle the pointer that it stands for, which only the driver follows.
pub fn pointer(handle: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(handle)
}

/// Reads a string that a call writes into a buffer of that length.
///
/// # Errors
/// Those of the call.
pub fn text(fill: impl FnOnce(*mut c_char, c_int) -> Result<(), CallError>) -> Result<String, CallError> {
    let mut buffer = [0u8; 256];
    fill(buffer.as_mut_ptr().cast(), buffer.len() as c_int - 1)?;
    let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

/// The keys of a list that hands a kernel's parameters over as one buffer, in the driver's numbers.
#[derive(Clone, Copy, Debug)]
pub struct LaunchKeys {
    /// The buffer follows.
    pub buffer: usize,
    /// Its length follows.
    pub len: usize,
    /// Nothing follows.
    pub end: usize,
}

impl LaunchKeys {
    /// Returns the list for parameters and their length, which both outlive it.
    pub fn list(self, params: &[u8], len: &mut usize) -> [*mut c_void; 5] {
        *len = params.len();
        [
            ptr::without_provenance_mut(self.buffer),
            params.as_ptr().cast_mut().cast(),
            ptr::without_provenance_mut(self.len),
            ptr::from_mut(len).cast(),
            ptr::without_provenance_mut(self.end),
        ]
    }
}
