//! Compiles the kernels with hipRTC for a device whose architecture this build has no code objects for.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use tensorhaul_device::gpu::{CompileError, table};

type Program = *mut c_void;

tensorhaul_device::driver_table! {
    /// AMD's run-time compiler.
    struct Table {
        fn hiprtcVersion(*mut c_int, *mut c_int);
        fn hiprtcGetErrorString(c_int) -> *const c_char;
        fn hiprtcCreateProgram(
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char,
        );
        fn hiprtcDestroyProgram(*mut Program);
        fn hiprtcCompileProgram(Program, c_int, *const *const c_char);
        fn hiprtcGetProgramLogSize(Program, *mut usize);
        fn hiprtcGetProgramLog(Program, *mut c_char);
        fn hiprtcGetCodeSize(Program, *mut usize);
        fn hiprtcGetCode(Program, *mut c_char);
        optional:
    }
}

/// hipRTC, loaded.
pub(crate) struct Compiler {
    table: Table,
}

impl Compiler {
    /// Finds the compiler that fits a HIP runtime: one that the user names, that the process holds, or that the runtime
    /// itself has, as it had before ROCm 7; else what ROCm installs. The error is a sentence.
    pub(crate) fn find(runtime: &Path) -> Result<Compiler, String> {
        if let Some(path) = env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
            return Compiler::load(&[path.into()]);
        }
        if let Some(table) =
            table::held("libhiprtc.so").and_then(|(library, path)| Table::look_up(library, &path).ok())
        {
            return Ok(Compiler { table });
        }
        if let Ok(table) = Table::load(&[runtime.to_owned()]) {
            return Ok(Compiler { table });
        }
        let names = ["libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so.5", "libhiprtc.so"];
        Compiler::load(
            &names.into_iter().chain(["/opt/rocm/lib/libhiprtc.so"]).map(PathBuf::from).collect::<Vec<_>>(),
        )
    }

    fn load(candidates: &[PathBuf]) -> Result<Compiler, String> {
        let table = Table::load(candidates).map_err(|error| format!("hipRTC would compile them: {error}"))?;
        Ok(Compiler { table })
    }

    /// Returns its name, version and library.
    pub(crate) fn name(&self) -> String {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers. A failure leaves zeroes.
        let _ = unsafe { (self.table.hiprtcVersion)(&raw mut major, &raw mut minor) };
        format!("hipRTC {major}.{minor} ({})", self.table.path.display())
    }

    /// Compiles a module of `kernels/` and returns its code object, in words for its alignment, with its length in bytes.
    ///
    /// The architecture must be that of a device that the runtime drives: given one that is newer than itself, hipRTC 5.2
    /// ends the process with a segmentation fault instead of an error.
    pub(crate) fn compile(
        &self,
        architecture: &str,
        module: &str,
    ) -> Result<(Vec<u64>, usize), CompileError> {
        let program = self.program(module)?;
        let architecture = CString::new(format!("--offload-arch={architecture}"));
        let architecture = architecture.map_err(|error| self.failed("an architecture", error.to_string()))?;
        let options: Vec<_> =
            OPTIONS.iter().map(|option| option.as_ptr()).chain([architecture.as_ptr()]).collect();
        // SAFETY: the program is alive; the options are terminated and read before the call returns.
        let code = unsafe {
            (self.table.hiprtcCompileProgram)(program.handle, options.len() as c_int, options.as_ptr())
        };
        if code != SUCCESS {
            return Err(self.failed(&self.error("hiprtcCompileProgram", code), program.log()));
        }
        let mut len = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (self.table.hiprtcGetCodeSize)(program.handle, &raw mut len) };
        self.check("hiprtcGetCodeSize", code)?;
        let mut image = vec![0u64; len.div_ceil(8)];
        // SAFETY: as long as was just told.
        let code = unsafe { (self.table.hiprtcGetCode)(program.handle, image.as_mut_ptr().cast()) };
        self.check("hiprtcGetCode", code)?;
        Ok((image, len))
    }

    /// Hands the sources over. They are read before the call returns, and copied.
    fn program(&self, module: &str) -> Result<Compiling<'_>, CompileError> {
        let text = |text: &str| CString::new(text).expect("sources and their names have no zero bytes");
        let source = SOURCES.iter().find(|(name, _)| *name == module);
        let (_, source) =
            source.ok_or_else(|| CompileError::NoCompiler(format!("there is no module {module}")))?;
        let (source, name) = (text(source), text(&format!("{module}.cc")));
        let headers: Vec<_> = HEADERS.iter().map(|(name, source)| (text(name), text(source))).collect();
        let header_names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let header_sources: Vec<_> = headers.iter().map(|(_, source)| source.as_ptr()).collect();
        let mut handle = ptr::null_mut();
        // SAFETY: writes one pointer; the texts are terminated, the lists as long as told.
        let code = unsafe {
            (self.table.hiprtcCreateProgram)(
                &raw mut handle,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                header_sources.as_ptr(),
                header_names.as_ptr(),
            )
        };
        self.check("hiprtcCreateProgram", code)?;
        Ok(Compiling { compiler: self, handle })
    }

    fn check(&self, call: &str, code: c_int) -> Result<(), CompileError> {
        if code == SUCCESS { Ok(()) } else { Err(self.failed(&self.error(call, code), String::new())) }
    }

    fn error(&self, call: &str, code: c_int) -> String {
        // SAFETY: takes any number.
        let name = unsafe { (self.table.hiprtcGetErrorString)(code) };
        if name.is_null() {
            return format!("{call} failed with {code}");
        }
        // SAFETY: the compiler's static, terminated string.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        format!("{call} failed with {code} ({name})")
    }

    fn failed(&self, what: &str, log: String) -> CompileError {
        CompileError::Failed { what: format!("{}: {what}", self.name()), log }
    }
}

/// A program under way.
struct Compiling<'c> {
    compiler: &'c Compiler,
    handle: Program,
}

impl Compiling<'_> {
    /// Returns what the compiler has to say; nothing where it does not say it.
    fn log(&self) -> String {
        let (table, mut len) = (&self.compiler.table, 0);
        // SAFETY: writes one integer.
        if unsafe { (table.hiprtcGetProgramLogSize)(self.handle, &raw mut len) } != SUCCESS {
            return String::new();
        }
        let mut text = vec![0u8; len + 1];
        // SAFETY: as long as was just told, and one more.
        if unsafe { (table.hiprtcGetProgramLog)(self.handle, text.as_mut_ptr().cast()) } != SUCCESS {
            return String::new();
        }
        CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Drop for Compiling<'_> {
    fn drop(&mut self) {
        // SAFETY: made by this compiler, and not used again.
        let _ = unsafe { (self.compiler.table.hiprtcDestroyProgram)(&raw mut self.handle) };
    }
}

macro_rules! texts {
    ($($name:literal),* ; $extension:literal) => {
        &[$(($name, include_str!(concat!("../../../kernels/", $name, $extension)))),*]
    };
}

/// The modules of `kernels/`, by name.
const SOURCES: &[(&str, &str)] =
    texts!["cast", "dequantize_any", "dequantize_rows", "dequantize_tiles", "scatter", "strided"; ".cc"];

/// What they include.
const HEADERS: &[(&str, &str)] =
    texts!["copy.h", "dequantize.h", "dequantize_params.h", "numbers.h", "params.h", "vendor.h"; ""];

/// As `cargo xtask kernels` has them, but for the version of the code object: the compiler's own is what its runtime loads.
const OPTIONS: &[&CStr] = &[c"-O3", c"-std=c++17", c"-ffp-contract=off", c"-fno-gpu-flush-denormals-to-zero"];

/// Names another hipRTC, for containers that keep it elsewhere and for tests.
const LIBRARY_VARIABLE: &str = "TENSORHAUL_HIPRTC_LIBRARY";

/// `HIPRTC_SUCCESS`.
const SUCCESS: c_int = 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_includes_what_is_embedded_and_nothing_else() {
        for (name, text) in SOURCES.iter().chain(HEADERS) {
            for line in text.lines().filter_map(|line| line.strip_prefix("#include ")) {
                let is_known = HEADERS.iter().any(|(header, _)| line == format!("\"{header}\""));
                assert!(is_known, "{name} includes {line}");
            }
        }
    }

    /// With AMD's own compiler, where a runtime that has one is installed. It needs no device.
    #[test]
    fn an_installed_compiler_compiles_every_module() {
        let Some(runtime) = ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"]
            .map(|name| Path::new("/usr/lib/x86_64-linux-gnu").join(name))
            .into_iter()
            .find(|path| path.exists())
        else {
            println!("skipped: no HIP runtime is installed (apt-get install libamdhip64-5)");
            return;
        };
        let compiler = match Compiler::find(&runtime) {
            Ok(compiler) => compiler,
            Err(why) => {
                println!("skipped: {why}");
                return;
            }
        };
        println!("{}", compiler.name());
        for (module, _) in SOURCES {
            // An architecture that every hipRTC since 5.2 knows, and for which there are no code objects.
            let (image, len) =
                compiler.compile("gfx906", module).unwrap_or_else(|error| panic!("{module}: {error:?}"));
            assert!(len > 1000 && image[0].to_le_bytes().starts_with(b"\x7fELF"), "{module}: {len} bytes");
        }
    }
}
