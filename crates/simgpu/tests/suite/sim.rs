//! The simulated driver, set up and asked by the tests that use it.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::{Library, Symbol};
use tensorhaul::exchange::{NCCL_LIBRARY_VARIABLE, RCCL_LIBRARY_VARIABLE};
use tensorhaul_direct::{CUFILE_LIBRARY_VARIABLE, HIPFILE_LIBRARY_VARIABLE};
use tensorhaul_stage::{HostMemory, Placement};

use crate::vendor;

/// The one machine of this process; tests take turns.
pub(crate) struct Sim {
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

impl Sim {
    /// Sets a machine up and waits for the turn of this test.
    pub(crate) fn new(config: &str) -> Sim {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        library();
        tensorhaul::release_devices(); // What the last test's machine left.
        let sim = Sim { _turn: turn };
        configure(library(), config);
        sim
    }

    /// Sets which calls fail or are slow from now on, lets those that are being slow go on, and forgets how often calls were made.
    pub(crate) fn fail(&self, config: &str) {
        assert_eq!(call_with_text(library(), b"simgpu_fail", config), 0, "{config}");
    }

    /// Returns what happened.
    pub(crate) fn report(&self) -> Happened {
        report(library())
    }

    /// Lets go of what loads keep, and asserts that nothing else is left and nothing was done that a driver forbids.
    pub(crate) fn assert_clean(&self, when: &str) {
        tensorhaul::release_devices();
        let happened = self.report();
        assert!(happened.violations.is_empty(), "{when}: {:?}", happened.violations);
        let left: Vec<_> = happened.live.iter().filter(|(_, count)| **count > 0).collect();
        assert!(left.is_empty(), "{when}: left behind: {left:?}");
    }
}

/// Counts of everything.
#[derive(Debug, Default)]
pub(crate) struct Happened {
    pub(crate) calls: BTreeMap<String, u64>,
    pub(crate) live: BTreeMap<String, u64>,
    pub(crate) violations: Vec<String>,
}

impl Drop for Sim {
    fn drop(&mut self) {
        tensorhaul::release_devices();
    }
}

impl Happened {
    pub(crate) fn calls(&self, name: &str) -> u64 {
        self.calls.get(name).copied().unwrap_or_default()
    }
}

/// The library beside this test's binary, which the vendor's backend is pointed to; others find nothing.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = library_path();
        // SAFETY: the first use in the process, before any thread of the backend reads the environment.
        unsafe { std::env::set_var(vendor::LIBRARY_VARIABLE, &path) };
        // SAFETY: as above.
        unsafe { std::env::set_var(vendor::LIBRARY_VARIABLE_OF_OTHERS, "/nowhere") };
        for variable in [NCCL_LIBRARY_VARIABLE, RCCL_LIBRARY_VARIABLE] {
            // SAFETY: as above.
            unsafe { std::env::set_var(variable, &path) };
        }
        for variable in [CUFILE_LIBRARY_VARIABLE, HIPFILE_LIBRARY_VARIABLE] {
            // A process of its own may have been given another.
            if std::env::var_os(variable).is_none() {
                // SAFETY: as above.
                unsafe { std::env::set_var(variable, &path) };
            }
        }
        // SAFETY: the project's own library; it has no initializers.
        unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    })
}

/// Cargo puts a package's dynamic library beside its tests. `cargo build` puts a link one folder up, which
/// `cargo test` does not renew: an older library may be behind it.
pub(crate) fn library_path() -> PathBuf {
    if let Some(path) = std::env::var_os("SIMGPU_LIBRARY") {
        return path.into(); // A process of its own, over a changed copy.
    }
    let test = std::env::current_exe().unwrap();
    let deps = test.parent().unwrap();
    let names = [deps.join("libsimgpu.so"), deps.parent().unwrap().join("libsimgpu.so")];
    names.into_iter().find(|path| path.exists()).expect("cargo test builds libsimgpu.so first")
}

/// Tells, and prints, whether this process may not say where its memory lies; containers forbid it as a rule.
pub(crate) fn may_not_choose_nodes() -> bool {
    let placement = HostMemory::allocate(4096).unwrap().near(0).placement();
    let is_forbidden = matches!(placement, Placement::Refused { errno: libc::EPERM | libc::ENOSYS, .. });
    if is_forbidden {
        println!("skipped: mbind is forbidden here");
    }
    is_forbidden
}

/// Returns a function that the library exports, for tests of what the backend does not call.
pub(crate) fn function<F: Copy>(name: &str) -> F {
    // SAFETY: the tests name the library's functions with their signatures.
    *unsafe { library().get::<F>(name) }.unwrap()
}

/// Returns what is told of a call that is not supported.
pub(crate) fn refusal(call: &str) -> String {
    failure(call, 801, vendor::NOT_SUPPORTED)
}

/// Returns what is told of a call that failed with a code of this name.
pub(crate) fn failure(call: &str, code: i32, name: &str) -> String {
    // Versions of a call are the linker's affair.
    let call = call.trim_end_matches("_v2");
    format!("{call} failed with {code} ({name})")
}

/// Queues a function of the host on a stream.
pub(crate) fn launch_host_function(
    stream: *mut c_void,
    function: extern "C" fn(*mut c_void),
    data: *mut c_void,
) -> i32 {
    type Call = unsafe extern "C" fn(*mut c_void, extern "C" fn(*mut c_void), *mut c_void) -> i32;
    // SAFETY: the caller passes what the function takes.
    unsafe { self::function::<Call>(vendor::call::HOST_CALL)(stream, function, data) }
}

/// Sets up the machine of a copy of the library.
pub(crate) fn configure(library: &Library, config: &str) {
    assert_eq!(call_with_text(library, b"simgpu_configure", config), 0, "{config}");
}

/// Returns what happened on the machine of a copy of the library.
pub(crate) fn report(library: &Library) -> Happened {
    type Report = unsafe extern "C" fn(*mut c_char, usize) -> usize;
    // SAFETY: the library exports this function with this signature.
    let report: Symbol<'_, Report> = unsafe { library.get(b"simgpu_report") }.unwrap();
    let mut text = vec![0u8; 1 << 16];
    // SAFETY: the buffer is that long.
    let needed = unsafe { report(text.as_mut_ptr().cast(), text.len()) };
    assert!(needed <= text.len());
    text.truncate(needed - 1);
    let text = String::from_utf8(text).unwrap();
    let mut happened = Happened::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        match key.strip_prefix("call.") {
            Some(name) => drop(happened.calls.insert(name.to_owned(), value.parse().unwrap())),
            None if key == "violation" => happened.violations.push(value.to_owned()),
            None => drop(happened.live.insert(key.to_owned(), value.parse().unwrap())),
        }
    }
    happened
}

fn call_with_text(library: &Library, name: &[u8], text: &str) -> i32 {
    type Call = unsafe extern "C" fn(*const c_char) -> i32;
    let text = CString::new(text).unwrap();
    // SAFETY: the library exports these functions with this signature.
    let call: Symbol<'_, Call> = unsafe { library.get(name) }.unwrap();
    // SAFETY: a terminated string.
    unsafe { call(text.as_ptr()) }
}
