//! Ranks connected by NVIDIA's NCCL, or AMD's RCCL.

use std::env;
use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tensorhaul_device::gpu::table::{TableError, held};
use tensorhaul_device::{Device, Stream};

use crate::control::Control;
use crate::nccl_init;
use crate::nccl_sys::{Comm, CommHandle, IN_PROGRESS, Table, UINT8, VERSION_MIN};
use crate::{Exchange, ExchangeError, Message};

/// Whose library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// NVIDIA's NCCL.
    Nccl,
    /// AMD's RCCL.
    Rccl,
}

impl Vendor {
    fn name(self) -> &'static str {
        match self {
            Vendor::Nccl => "NCCL",
            Vendor::Rccl => "RCCL",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            Vendor::Nccl => NCCL_LIBRARY_VARIABLE,
            Vendor::Rccl => RCCL_LIBRARY_VARIABLE,
        }
    }

    fn files(self) -> [&'static str; 2] {
        match self {
            Vendor::Nccl => ["libnccl.so.2", "libnccl.so"],
            Vendor::Rccl => ["librccl.so.1", "librccl.so"],
        }
    }

    /// Loads the library: the one that the user names, one that the process has already (frameworks bring theirs, in folders that the
    /// loader does not search), or the system's.
    fn load(self) -> Result<Table, ExchangeError> {
        let of_user = env::var_os(self.variable()).filter(|path| !path.is_empty());
        let table = match (of_user, held(self.files()[1])) {
            (Some(path), _) => Table::load(&[PathBuf::from(path)]),
            (None, Some((library, path))) => Table::look_up(library, &path),
            (None, None) => Table::load(&self.files().map(PathBuf::from)),
        };
        let unusable = |source: TableError| ExchangeError::Library {
            name: self.name(),
            variable: self.variable(),
            source,
        };
        table.map_err(unusable)
    }
}

/// A communicator of a node's ranks, each with a device of its own.
pub struct Nccl {
    vendor: Vendor,
    version: i32,
    shared: Arc<Shared>,
    watch: Option<JoinHandle<()>>,
}

/// What the rank's own thread and the one that watches the peers both use.
struct Shared {
    table: Arc<Table>,
    control: Control,
    state: Mutex<State>,
    is_over: AtomicBool,
}

/// The communicator, and since when a call is under way.
struct State {
    comm: CommHandle,
    began: Option<Instant>,
    is_aborted: bool,
}

impl Nccl {
    /// Connects the ranks that have met, each with its device. Waits for all of them.
    ///
    /// # Errors
    /// [`ExchangeError::Library`] and [`ExchangeError::TooOld`] when the library cannot be used, [`ExchangeError::Call`] when a call of it
    /// failed, [`ExchangeError::TimedOut`] when a rank does not call this, and those of [`Control::agree`].
    pub fn connect(
        vendor: Vendor,
        device: &Arc<dyn Device>,
        control: Control,
    ) -> Result<Nccl, ExchangeError> {
        let connected = vendor.load().and_then(|table| {
            let (version, table) = (version(&table)?, Arc::new(table));
            let comm = nccl_init::connect(&table, device, &control, version)?;
            Ok((version, table, comm))
        });
        let (version, table, comm) = connected.inspect_err(|_| control.abort())?;
        let state = State { comm, began: None, is_aborted: false };
        let shared =
            Arc::new(Shared { table, control, state: Mutex::new(state), is_over: AtomicBool::new(false) });
        let watched = Arc::clone(&shared);
        let watch = thread::Builder::new().name("tensorhaul-peers".to_owned()).spawn(move || watched.watch());
        // Without it a call that hangs because a peer is gone would hang for ever.
        let watch = watch.map_err(|source| {
            shared.abort();
            ExchangeError::Thread { doing: "watching the other ranks", source }
        })?;
        Ok(Nccl { vendor, version, shared, watch: Some(watch) })
    }
}

fn version(table: &Table) -> Result<c_int, ExchangeError> {
    let mut version = 0;
    // SAFETY: writes one integer.
    table.check("ncclGetVersion", None, unsafe { (table.ncclGetVersion)(&raw mut version) })?;
    match version >= VERSION_MIN {
        true => Ok(version),
        false => Err(ExchangeError::TooOld { library: table.path.clone(), version }),
    }
}

impl CommHandle {
    /// Ends a communicator that nobody uses after this; NCCL lets a call that waits for peers end.
    pub(crate) fn abort(self, table: &Table) {
        // SAFETY: the communicator lives, and no call of it begins after this.
        let code = unsafe { (table.ncclCommAbort)(self.0) };
        if let Err(error) = table.check("ncclCommAbort", None, code) {
            tracing::warn!(%error, "a communicator could not be aborted");
        }
    }
}

impl Table {
    pub(crate) fn check(
        &self,
        call: &'static str,
        comm: Option<Comm>,
        code: c_int,
    ) -> Result<(), ExchangeError> {
        if code == 0 || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: takes any number.
        let named = text(unsafe { (self.ncclGetErrorString)(code) }).unwrap_or_else(|| "unknown".to_owned());
        let detail = self.ncclGetLastError.and_then(|last| {
            // SAFETY: takes a communicator that lives, or none.
            text(unsafe { last(comm.unwrap_or(ptr::null_mut())) })
        });
        Err(ExchangeError::Call { call, code, text: named, detail })
    }
}

fn text(start: *const c_char) -> Option<String> {
    if start.is_null() {
        return None;
    }
    // SAFETY: the library's own text, terminated and kept by it.
    let text = unsafe { CStr::from_ptr(start) }.to_string_lossy();
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

impl Shared {
    /// Aborts the communicator when a peer is gone or a call does not return: NCCL waits for ever, also inside its calls.
    fn watch(&self) {
        while !self.is_over.load(Ordering::Acquire) {
            thread::sleep(WATCH_POLL);
            let began = self.lock().began;
            let is_late = began.is_some_and(|began| began.elapsed() > self.control.timeout());
            if (is_late || self.control.check().is_err()) && self.abort() {
                return;
            }
        }
    }

    /// Aborts the communicator, unless a call of it has just begun: one that does not wait for anybody returns soon, and must not lose its
    /// communicator meanwhile. Returns whether it is aborted.
    fn abort(&self) -> bool {
        let mut state = self.lock();
        if state.is_aborted {
            return true;
        }
        if state.began.is_some_and(|began| began.elapsed() < CALL_GRACE) {
            return false;
        }
        state.is_aborted = true;
        self.control.abort();
        state.comm.abort(&self.table);
        true
    }

    /// Queues one group. The lock is not held in NCCL's calls, which may wait for peers: `abort` must be able to end them.
    fn group(
        &self,
        comm: Comm,
        sends: &[Message<'_>],
        receives: &[Message<'_>],
        stream: u64,
    ) -> Result<(), ExchangeError> {
        let (table, stream) = (&self.table, ptr::without_provenance_mut(stream as usize));
        // SAFETY: takes nothing.
        table.check("ncclGroupStart", Some(comm), unsafe { (table.ncclGroupStart)() })?;
        let queued = sends.iter().try_for_each(|send| {
            let (address, len) = (send.start.range(send.len_bytes), send.len_bytes as usize);
            let source = ptr::with_exposed_provenance(address as usize);
            // SAFETY: the caller of `exchange` keeps the memory and the stream until the message is complete.
            let code = unsafe { (table.ncclSend)(source, len, UINT8, send.peer as c_int, comm, stream) };
            table.check("ncclSend", Some(comm), code)
        });
        let queued = queued.and_then(|()| {
            receives.iter().try_for_each(|receive| {
                let address = receive.start.range(receive.len_bytes);
                let target = ptr::with_exposed_provenance_mut(address as usize);
                let (len, peer) = (receive.len_bytes as usize, receive.peer as c_int);
                // SAFETY: as above.
                let code = unsafe { (table.ncclRecv)(target, len, UINT8, peer, comm, stream) };
                table.check("ncclRecv", Some(comm), code)
            })
        });
        // Also after a failure: a group that was begun is ended.
        // SAFETY: takes nothing.
        let code = unsafe { (table.ncclGroupEnd)() };
        let ended = table.check("ncclGroupEnd", Some(comm), code);
        let ended = ended.and_then(|()| if code == IN_PROGRESS { self.settle() } else { Ok(()) });
        queued.and(ended)
    }

    /// Waits until a group is on its stream: what is recorded before would not be behind it, and the next call would be refused. `watch`
    /// ends it when a peer is gone or time is up.
    fn settle(&self) -> Result<(), ExchangeError> {
        while self.async_state("ncclGroupEnd")? == IN_PROGRESS {
            thread::sleep(SETTLE_POLL);
        }
        Ok(())
    }

    /// Asks what became of calls that do not wait for it: their status, in progress or success. The `call` is what a failure is told of.
    fn async_state(&self, call: &'static str) -> Result<c_int, ExchangeError> {
        let state = self.lock();
        if state.is_aborted {
            return Err(self.control.lost());
        }
        let Some(ask) = self.table.ncclCommGetAsyncError else { return Ok(0) };
        let mut found = 0;
        // SAFETY: the communicator lives while the lock is held and it is not aborted; writes one integer.
        let code = unsafe { ask(state.comm.0, &raw mut found) };
        self.table.check("ncclCommGetAsyncError", Some(state.comm.0), code)?;
        self.table.check(call, Some(state.comm.0), found)?;
        Ok(found)
    }

    /// A panic elsewhere cannot leave the state half changed: every change is one plain write.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchange for Nccl {
    fn rank(&self) -> u32 {
        self.shared.control.rank()
    }

    fn size(&self) -> u32 {
        self.shared.control.size()
    }

    fn name(&self) -> String {
        let (Vendor::Nccl | Vendor::Rccl) = self.vendor;
        let file = Path::file_name(&self.shared.table.path).unwrap_or_default().to_string_lossy();
        format!("{} {} ({file})", self.vendor.name(), self.version)
    }

    fn fallbacks(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn timeout(&self) -> Duration {
        self.shared.control.timeout()
    }

    fn agree(&self, fingerprint: u64) -> Result<(), ExchangeError> {
        self.shared.control.agree(fingerprint)
    }

    unsafe fn exchange(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        sends: &[Message<'_>],
        receives: &[Message<'_>],
    ) -> Result<(), ExchangeError> {
        if sends.is_empty() && receives.is_empty() {
            return Ok(());
        }
        let comm = {
            let mut state = self.shared.lock();
            if state.is_aborted {
                return Err(self.shared.control.lost());
            }
            state.began = Some(Instant::now());
            state.comm.0
        };
        let mut queued = Ok(());
        let lent = device.lend(stream, &mut |stream| {
            queued = self.shared.group(comm, sends, receives, stream);
        });
        let queued = lent.map_err(ExchangeError::Device).and(queued);
        let mut state = self.shared.lock();
        state.began = None;
        match queued {
            // What a call says that was ended from outside is not why.
            Err(_) if state.is_aborted => Err(self.shared.control.lost()),
            queued => queued,
        }
    }

    fn check(&self) -> Result<(), ExchangeError> {
        self.shared.control.check()?;
        self.shared.async_state("a transfer").map(drop)
    }

    fn abort(&self) {
        // A call of another thread, against the contract, is given the time that it has.
        while !self.shared.abort() {
            thread::sleep(WATCH_POLL);
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        if let Some(watch) = self.watch.take() {
            let _ = watch.join(); // It does not panic; and if it did, there would be nothing to do.
        }
        if thread::panicking() {
            self.shared.abort(); // Its exchanges may not be complete, which a destroyed one would wait for.
        }
        let state = self.shared.lock();
        if !state.is_aborted {
            // SAFETY: the communicator lives, its exchanges are complete, and nobody uses it any more.
            let code = unsafe { (self.shared.table.ncclCommDestroy)(state.comm.0) };
            if let Err(error) = self.shared.table.check("ncclCommDestroy", None, code) {
                tracing::warn!(%error, "a communicator could not be destroyed");
            }
        }
    }
}

/// How long a call may take that waits for nobody.
const CALL_GRACE: Duration = Duration::from_secs(1);

/// How long a peer may be gone before a call that waits for it is ended.
const WATCH_POLL: Duration = Duration::from_millis(20);

/// How often it is asked whether a group is on its stream, which takes microseconds once all ranks are connected.
const SETTLE_POLL: Duration = Duration::from_micros(20);

/// Names another library instead of `libnccl.so.2`, for tests and for those in folders that the loader does not search.
pub const NCCL_LIBRARY_VARIABLE: &str = "TENSORHAUL_NCCL_LIBRARY";

/// As [`NCCL_LIBRARY_VARIABLE`], instead of `librccl.so.1`.
pub const RCCL_LIBRARY_VARIABLE: &str = "TENSORHAUL_RCCL_LIBRARY";
