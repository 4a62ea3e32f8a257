//! The functions of NCCL and RCCL, over the simulated machine: ranks are threads of one process, each with a device.
//!
//! A group's messages are queued on its streams. A receive waits on its stream for the peer's message, copies, and lets the peer's
//! stream go on. As with the real ones, a rank that never comes is waited for until somebody aborts, and by the call that waits inside it
//! for ever; tests let that one go with `simgpu_fail`.
//!
//! # Safety
//! Each function asks of its caller what NCCL's documentation asks: pointers that may be written, handles that live.

#![allow(non_snake_case, reason = "the library's own names")]
#![allow(clippy::missing_safety_doc, reason = "one promise for all of them, above")]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::core;
use crate::stream::{Event, Work};

/// `ncclUniqueId`, passed by value.
#[repr(C)]
pub(crate) struct UniqueId {
    internal: [u8; 128],
}

/// `ncclConfig_t`, the fields that all versions have.
#[repr(C)]
pub(crate) struct InitConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// Everything that communicators share.
#[derive(Default)]
struct Node {
    ids: u64,
    /// By identifier: the ranks that have come, each with its device.
    meetings: HashMap<u64, HashMap<c_int, usize>>,
    /// By handle.
    comms: HashMap<usize, Arc<Comm>>,
    /// Sent and not yet taken, by identifier, sender and receiver.
    posted: HashMap<(u64, c_int, c_int), VecDeque<Posted>>,
    handles: usize,
}

struct Comm {
    id: u64,
    rank: c_int,
    size: c_int,
    device: usize,
    is_aborted: AtomicBool,
    /// How often its status is still in progress when it is asked for, where calls do not wait.
    busy: Option<AtomicU32>,
    /// What its streams wait for; ended by an abort.
    unfinished: Mutex<Vec<(Arc<Event>, u64)>>,
    /// Held while a peer copies from it.
    copying: Mutex<()>,
}

/// A message whose sender's stream waits until it is taken.
struct Posted {
    sender: Arc<Comm>,
    address: u64,
    len: usize,
    /// Complete when the sender's stream has come to it.
    ready: (Arc<Event>, u64),
    taken: (Arc<Event>, u64),
}

/// A message of a group that is being put together.
struct Pending {
    comm: usize,
    is_send: bool,
    address: u64,
    len: usize,
    peer: c_int,
    stream: usize,
}

/// A receive as its stream gets it.
struct Receive {
    comm: Arc<Comm>,
    peer: c_int,
    address: u64,
    len: usize,
}

static NODE: Mutex<Option<Node>> = Mutex::new(None);
static CHANGED: Condvar = Condvar::new();

thread_local! {
    /// How many groups are open on this thread, and their messages.
    static GROUP: RefCell<(u32, Vec<Pending>)> = const { RefCell::new((0, Vec::new())) };
}

fn lock() -> MutexGuard<'static, Option<Node>> {
    NODE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with<T>(act: impl FnOnce(&mut Node) -> T) -> T {
    act(lock().get_or_insert_with(Node::default))
}

/// Returns the number of communicators that live.
pub(crate) fn live() -> usize {
    with(|node| node.comms.len())
}

fn count(name: &'static str) -> c_int {
    core::call(name, |_| Ok(()))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller passes a pointer that may be written.
    unsafe { version.write(core::with(|machine| machine.config.nccl) as c_int) };
    count("ncclGetVersion")
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    let number = with(|node| {
        node.ids += 1;
        node.ids
    });
    let mut internal = [0x5a; 128];
    internal[..8].copy_from_slice(&number.to_le_bytes());
    // SAFETY: the caller passes a pointer that may be written.
    unsafe { id.write(UniqueId { internal }) };
    count("ncclGetUniqueId")
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitRank(
    comm: *mut *mut c_void,
    size: c_int,
    id: UniqueId,
    rank: c_int,
) -> c_int {
    let code = count("ncclCommInitRank");
    if code != 0 {
        return code;
    }
    let made = match come(&id, rank, size, None) {
        Ok(made) => made,
        Err(code) => return code,
    };
    let pace = || core::with(|machine| machine.pace);
    let began = pace();
    let mut guard = lock();
    while !guard.get_or_insert_with(Node::default).is_met(&made) {
        guard = CHANGED.wait_timeout(guard, POLL).unwrap_or_else(PoisonError::into_inner).0;
        drop(guard);
        if pace() != began {
            with(|node| node.leave(&made));
            return SYSTEM_ERROR;
        }
        guard = lock();
    }
    drop(guard);
    // SAFETY: the caller passes a pointer that may be written.
    unsafe { comm.write(ptr::without_provenance_mut(with(|node| node.keep(made)))) };
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut c_void,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut InitConfig,
) -> c_int {
    let code = count("ncclCommInitRankConfig");
    if code != 0 {
        return code;
    }
    // SAFETY: the caller passes a configuration.
    let InitConfig { size: config_len, magic, version, blocking } = unsafe { config.read() };
    if (magic, version, config_len) != (0xcafe_beef, 21_400, 24) || blocking != 0 {
        return INVALID_ARGUMENT; // What else the library takes nobody asks for.
    }
    match come(&id, rank, size, Some(AtomicU32::new(0))) {
        Ok(made) => {
            // SAFETY: the caller passes a pointer that may be written.
            unsafe { comm.write(ptr::without_provenance_mut(with(|node| node.keep(made)))) };
            IN_PROGRESS
        }
        Err(code) => code,
    }
}

/// Brings a rank, with the device that is current, to its meeting.
fn come(id: &UniqueId, rank: c_int, size: c_int, busy: Option<AtomicU32>) -> Result<Comm, c_int> {
    let id = u64::from_le_bytes(*id.internal.first_chunk().ok_or(INVALID_ARGUMENT)?);
    let device = core::with(|machine| machine.current());
    let (Some(device), true) = (device.checked_sub(1), (0..size).contains(&rank)) else {
        return Err(INVALID_ARGUMENT);
    };
    with(|node| {
        let meeting = node.meetings.entry(id).or_default();
        if meeting.values().any(|other| *other == device) || meeting.insert(rank, device).is_some() {
            return Err(INVALID_USAGE); // Two ranks on one device.
        }
        Ok(())
    })?;
    CHANGED.notify_all();
    let (is_aborted, unfinished, copying) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
    Ok(Comm { id, rank, size, device, is_aborted, busy, unfinished, copying })
}

impl Node {
    fn is_met(&self, comm: &Comm) -> bool {
        self.meetings.get(&comm.id).is_some_and(|ranks| ranks.len() == comm.size as usize)
    }

    fn keep(&mut self, comm: Comm) -> usize {
        self.handles += 0x10;
        self.comms.insert(self.handles, Arc::new(comm));
        self.handles
    }

    /// A rank that goes before all have come is waited for again; one that goes later was there.
    fn leave(&mut self, comm: &Comm) {
        if !self.is_met(comm)
            && let Some(meeting) = self.meetings.get_mut(&comm.id)
        {
            meeting.remove(&comm.rank);
        }
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommDestroy(comm: *mut c_void) -> c_int {
    let code = count("ncclCommDestroy");
    match with(|node| node.comms.remove(&comm.addr())) {
        Some(_) => code,
        None => INVALID_ARGUMENT,
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommAbort(comm: *mut c_void) -> c_int {
    let code = count("ncclCommAbort");
    let removed = with(|node| {
        let comm = node.comms.remove(&comm.addr())?;
        node.leave(&comm);
        Some(comm)
    });
    let Some(comm) = removed else { return INVALID_ARGUMENT };
    comm.is_aborted.store(true, Ordering::Release);
    drop(comm.copying.lock().unwrap_or_else(PoisonError::into_inner)); // Nobody copies from it any more.
    for (event, recording) in comm.unfinished.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        event.complete(recording);
    }
    CHANGED.notify_all();
    code
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommGetAsyncError(comm: *mut c_void, error: *mut c_int) -> c_int {
    let state = with(|node| {
        let comm = node.comms.get(&comm.addr()).ok_or(INVALID_ARGUMENT)?;
        let is_busy = comm.busy.as_ref().is_some_and(|busy| {
            let asked = busy.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1));
            asked.is_ok() || !node.is_met(comm)
        });
        Ok(if is_busy { IN_PROGRESS } else { 0 })
    });
    match state {
        Ok(state) => {
            // SAFETY: the caller passes a pointer that may be written.
            unsafe { error.write(state) };
            count("ncclCommGetAsyncError")
        }
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    let text = match code {
        0 => c"no error",
        SYSTEM_ERROR => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        INVALID_ARGUMENT => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        INVALID_USAGE => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGetLastError(_comm: *mut c_void) -> *const c_char {
    c"as the simulator was told".as_ptr()
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|(depth, _)| *depth += 1);
    count("ncclGroupStart")
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGroupEnd() -> c_int {
    let ended = GROUP.with_borrow_mut(|(depth, pending)| {
        *depth = depth.saturating_sub(1);
        if *depth == 0 { std::mem::take(pending) } else { Vec::new() }
    });
    match count("ncclGroupEnd") {
        0 => queue(&ended).map_or_else(|code| code, |()| begin(&ended)),
        code => code,
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclSend(
    source: *const c_void,
    len: usize,
    dtype: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let (address, comm, stream) = (source.addr() as u64, comm.addr(), stream.addr());
    add("ncclSend", dtype, Pending { comm, is_send: true, address, len, peer, stream })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclRecv(
    target: *mut c_void,
    len: usize,
    dtype: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let (address, comm, stream) = (target.addr() as u64, comm.addr(), stream.addr());
    add("ncclRecv", dtype, Pending { comm, is_send: false, address, len, peer, stream })
}

fn add(name: &'static str, dtype: c_int, pending: Pending) -> c_int {
    let code = count(name);
    if code != 0 {
        return code;
    }
    if dtype != UINT8 {
        return INVALID_ARGUMENT;
    }
    GROUP.with_borrow_mut(|(depth, group)| match depth {
        0 => queue(&[pending]).err().unwrap_or(0),
        _ => {
            group.push(pending);
            0
        }
    })
}

/// Lets communicators whose calls do not wait be busy with a group for a while.
fn begin(group: &[Pending]) -> c_int {
    let comms = group.iter().filter_map(|pending| with(|node| node.comms.get(&pending.comm).cloned()));
    let busy = comms.filter_map(|comm| comm.busy.as_ref().map(|busy| busy.store(2, Ordering::Release)));
    if busy.count() > 0 { IN_PROGRESS } else { 0 }
}

/// Queues the messages of one group: marks where what is sent is ready, then the receives, then waits for what is sent to be taken.
fn queue(group: &[Pending]) -> Result<(), c_int> {
    let mut waits = Vec::new();
    for pending in group.iter().filter(|pending| pending.is_send) {
        let (comm, stream) = check(pending)?;
        let (ready, taken) = (Arc::new(Event::default()), Arc::new(Event::default()));
        let (ready, taken) = ((Arc::clone(&ready), ready.record()), (Arc::clone(&taken), taken.record()));
        stream.queue(Work::Complete(Arc::clone(&ready.0), ready.1));
        comm.unfinished.lock().unwrap_or_else(PoisonError::into_inner).push(taken.clone());
        waits.push((stream, taken.clone()));
        let key = (comm.id, comm.rank, pending.peer);
        let posted = Posted { sender: comm, address: pending.address, len: pending.len, ready, taken };
        with(|node| node.posted.entry(key).or_default().push_back(posted));
    }
    CHANGED.notify_all();
    for pending in group.iter().filter(|pending| !pending.is_send) {
        let (comm, stream) = check(pending)?;
        let receive = Receive { comm, peer: pending.peer, address: pending.address, len: pending.len };
        let receive = Box::into_raw(Box::new(receive));
        stream.queue(Work::Call(take, receive.expose_provenance()));
    }
    for (stream, (event, recording)) in waits {
        stream.queue(Work::Wait(event, recording));
    }
    Ok(())
}

/// Checks what a message says; what a library would let pass is a violation.
fn check(pending: &Pending) -> Result<(Arc<Comm>, Arc<crate::stream::Stream>), c_int> {
    let comm = with(|node| node.comms.get(&pending.comm).cloned()).ok_or(INVALID_ARGUMENT)?;
    let is_busy = comm.busy.as_ref().is_some_and(|busy| busy.load(Ordering::Acquire) > 0);
    if is_busy || !with(|node| node.is_met(&comm)) {
        return Err(INVALID_ARGUMENT); // Used before the call before it was done.
    }
    if !(0..comm.size).contains(&pending.peer) || pending.peer == comm.rank || pending.len == 0 {
        return Err(INVALID_ARGUMENT);
    }
    core::with(|machine| {
        let stream = machine.stream(pending.stream).map_err(|_| INVALID_ARGUMENT)?;
        if stream.device != comm.device {
            machine
                .violations
                .push(format!("a message of device {} on a stream of {}", comm.device, stream.device));
        }
        let checked = machine.check_device_range(comm.device, pending.address, pending.len as u64);
        checked.map_err(|_| INVALID_ARGUMENT)?;
        Ok((comm, stream))
    })
}

/// Receives one message, on the thread of its stream.
unsafe extern "C" fn take(receive: *mut c_void) {
    // SAFETY: made by `queue` for this call alone.
    let receive = unsafe { Box::from_raw(receive.cast::<Receive>()) };
    let key = (receive.comm.id, receive.peer, receive.comm.rank);
    let is_aborted = || receive.comm.is_aborted.load(Ordering::Acquire);
    let mut guard = lock();
    let posted = loop {
        if is_aborted() {
            return;
        }
        let queue = guard.get_or_insert_with(Node::default).posted.get_mut(&key);
        if let Some(posted) = queue.and_then(VecDeque::pop_front) {
            break posted;
        }
        guard = CHANGED.wait_timeout(guard, POLL).unwrap_or_else(PoisonError::into_inner).0;
    };
    drop(guard);
    while !posted.ready.0.is_complete(posted.ready.1) {
        if is_aborted() {
            return;
        }
        thread::sleep(POLL);
    }
    let copying = posted.sender.copying.lock().unwrap_or_else(PoisonError::into_inner);
    if posted.sender.is_aborted.load(Ordering::Acquire) {
        return;
    }
    let is_valid = core::with(|machine| {
        if posted.len != receive.len {
            machine.violations.push(format!("{} bytes sent, {} received", posted.len, receive.len));
        }
        let ends = [posted.address, receive.address];
        posted.len == receive.len
            && ends.iter().all(|end| machine.check_not_freed(*end as usize, receive.len))
    });
    if is_valid {
        let source = ptr::with_exposed_provenance::<u8>(posted.address as usize);
        let target = ptr::with_exposed_provenance_mut::<u8>(receive.address as usize);
        // SAFETY: both are inside allocations, as just checked, and nobody else's until the streams go on.
        unsafe { ptr::copy_nonoverlapping(source, target, receive.len) };
    }
    drop(copying);
    posted.taken.0.complete(posted.taken.1);
}

const POLL: Duration = Duration::from_millis(1);

/// `ncclUint8`.
const UINT8: c_int = 1;
const SYSTEM_ERROR: c_int = 2;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const IN_PROGRESS: c_int = 7;
