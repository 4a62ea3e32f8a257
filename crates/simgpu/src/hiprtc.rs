//! The functions of AMD's run-time compiler, which compiles nothing: for an architecture it knows of it hands back a code
//! object that is checked in, marked for that one.
//!
//! # Safety
//! Each function asks of its caller what hipRTC's reference asks: pointers that may be written, programs that live.

#![allow(non_snake_case, reason = "the compiler's own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use crate::calls::{array, calls, give};
use crate::core;

/// A program, and what became of it.
struct Program {
    name: String,
    /// What its sources include, and is not there.
    missing: Vec<String>,
    code: Vec<u8>,
    log: String,
}

calls! {
    through core::call;

    fn hiprtcVersion(major: *mut c_int, minor: *mut c_int) |_machine| {
        give!(major, 9)?;
        give!(minor, 0)
    };
    fn hiprtcCreateProgram(
        program: *mut *mut c_void, source: *const c_char, name: *const c_char, header_count: c_int,
        headers: *const *const c_char, header_names: *const *const c_char,
    ) |_machine| {
        // SAFETY: the caller passes lists of `header_count` texts.
        let headers = unsafe { texts(headers, header_count) };
        // SAFETY: as above.
        let names = unsafe { texts(header_names, header_count) };
        // SAFETY: the caller passes terminated texts.
        let (source, name) = (unsafe { text(source) }, unsafe { text(name) });
        let includes = headers.iter().chain([&source]).flat_map(|text| text.lines());
        let includes = includes.filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
        let missing = includes.filter(|include| !names.iter().any(|name| name == include)).map(str::to_owned).collect();
        let made = Program { name, missing, code: Vec::new(), log: String::new() };
        give!(program, Box::into_raw(Box::new(made)).cast())
    };
    fn hiprtcDestroyProgram(program: *mut *mut c_void) |_machine| {
        // SAFETY: the caller passes a program of its own.
        let made = unsafe { *program };
        // SAFETY: made above, and not used again.
        drop(unsafe { Box::from_raw(made.cast::<Program>()) });
        give!(program, ptr::null_mut())
    };
    fn hiprtcCompileProgram(program: *mut c_void, option_count: c_int, options: *const *const c_char) |_machine| {
        // SAFETY: the caller passes a list of `option_count` texts.
        let options = unsafe { texts(options, option_count) };
        // SAFETY: the caller passes a program of its own.
        unsafe { program_of(program) }.compile(&options)
    };
    fn hiprtcGetProgramLogSize(program: *mut c_void, len: *mut usize) |_machine| {
        // SAFETY: as above.
        let program = unsafe { program_of(program) };
        give!(len, program.log().len() + 1)
    };
    fn hiprtcGetProgramLog(program: *mut c_void, log: *mut c_char) |_machine| {
        // SAFETY: as above.
        let text = unsafe { program_of(program) }.log();
        // SAFETY: the caller passes as much as the log takes.
        unsafe { core::write_text(log, text.len() + 1, text) };
        Ok(())
    };
    fn hiprtcGetCodeSize(program: *mut c_void, len: *mut usize) |_machine| {
        // SAFETY: as above.
        let program = unsafe { program_of(program) };
        give!(len, program.code.len())
    };
    fn hiprtcGetCode(program: *mut c_void, code: *mut u8) |_machine| {
        // SAFETY: as above.
        let program = unsafe { program_of(program) };
        // SAFETY: the caller passes as much as the code takes.
        unsafe { ptr::copy_nonoverlapping(program.code.as_ptr(), code, program.code.len()) };
        Ok(())
    };
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn hiprtcGetErrorString(code: c_int) -> *const c_char {
    let name = match code {
        COMPILATION => c"HIPRTC_ERROR_COMPILATION",
        INVALID_OPTION => c"HIPRTC_ERROR_INVALID_OPTION",
        _ => c"HIPRTC_ERROR_INTERNAL_ERROR",
    };
    name.as_ptr()
}

impl Program {
    fn compile(&mut self, options: &[String]) -> Result<(), i32> {
        let architecture = options.iter().find_map(|option| option.strip_prefix("--offload-arch="));
        let architecture = architecture.ok_or(INVALID_OPTION)?;
        if let Some(missing) = self.missing.first() {
            self.log = format!("{}:1:10: fatal error: '{missing}' file not found\n", self.name);
            return Err(COMPILATION);
        }
        let module = self.name.trim_end_matches(".cc");
        let of_this_length = CODE_OBJECTS.iter().filter(|(known, ..)| known.len() == architecture.len());
        let Some((known, _, code)) = of_this_length.into_iter().find(|(_, name, _)| *name == module) else {
            self.log = format!("error: unknown target '{architecture}'\n");
            return Err(COMPILATION);
        };
        let (from, to) = (format!("--{known}"), format!("--{architecture}"));
        self.code = code.to_vec();
        while let Some(at) = self.code.windows(from.len()).position(|bytes| bytes == from.as_bytes()) {
            self.code[at..][..to.len()].copy_from_slice(to.as_bytes());
        }
        Ok(())
    }

    /// Returns what is told of a compilation that did not succeed. One that was made to fail never began.
    fn log(&self) -> &str {
        match self.code.is_empty() && self.log.is_empty() {
            true => "1 warning generated.\nvendor.h:1:1: error: made to fail\n",
            false => &self.log,
        }
    }
}

/// # Safety
/// A program of [`hiprtcCreateProgram`] that nobody else uses meanwhile.
unsafe fn program_of<'p>(program: *mut c_void) -> &'p mut Program {
    // SAFETY: the caller's promise.
    unsafe { &mut *program.cast::<Program>() }
}

/// # Safety
/// A terminated text.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// # Safety
/// A list of as many terminated texts.
unsafe fn texts(list: *const *const c_char, count: c_int) -> Vec<String> {
    // SAFETY: the caller's promise.
    let list = unsafe { array(list, count as usize) };
    // SAFETY: as above.
    list.iter().map(|entry| unsafe { text(*entry) }).collect()
}

macro_rules! code_objects {
    ($($architecture:literal $module:literal,)*) => {
        &[$((
            $architecture,
            $module,
            include_bytes!(concat!("../../../kernels/compiled/", $architecture, "/", $module, ".hsaco")),
        )),*]
    };
}

/// For architectures whose names have six letters and seven: an architecture, a module, its code object.
const CODE_OBJECTS: &[(&str, &str, &[u8])] = code_objects! {
    "gfx942" "cast",
    "gfx942" "dequantize_any",
    "gfx942" "dequantize_rows",
    "gfx942" "dequantize_tiles",
    "gfx942" "scatter",
    "gfx942" "strided",
    "gfx1100" "cast",
    "gfx1100" "dequantize_any",
    "gfx1100" "dequantize_rows",
    "gfx1100" "dequantize_tiles",
    "gfx1100" "scatter",
    "gfx1100" "strided",
};

/// `HIPRTC_ERROR_INVALID_OPTION`.
const INVALID_OPTION: i32 = 5;
/// `HIPRTC_ERROR_COMPILATION`.
const COMPILATION: i32 = 6;
