//! How a rank's communicator comes to be: NCCL waits for ever for ranks that do not come, this waits as long as they are there.

use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SendError};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_device::Device;

use crate::ExchangeError;
use crate::control::Control;
use crate::nccl_sys::{
    AskFn, BeginFn, Comm, CommHandle, Config, IN_PROGRESS, Table, UNIQUE_ID_BYTES, UniqueId, VERSION_CONFIG,
};

/// A rank's place in the communicator that is to be.
#[derive(Clone, Copy)]
struct Place {
    id: UniqueId,
    rank: c_int,
    size: c_int,
}

/// Makes the communicator of the ranks that have met, which all call this.
pub(crate) fn connect(
    table: &Arc<Table>,
    device: &Arc<dyn Device>,
    control: &Control,
    version: c_int,
) -> Result<CommHandle, ExchangeError> {
    // Libraries of different versions do not understand each other.
    control.agree(version as u64)?;
    let mut id = UniqueId { internal: [0; UNIQUE_ID_BYTES] };
    if control.rank() == 0 {
        // SAFETY: writes one identifier.
        table.check("ncclGetUniqueId", None, unsafe { (table.ncclGetUniqueId)(&raw mut id) })?;
    }
    control.spread(&mut id.internal)?;
    let place = Place { id, rank: control.rank() as c_int, size: control.size() as c_int };
    let patience = Patience { control, until: Instant::now() + control.timeout() };
    match (table.ncclCommInitRankConfig, table.ncclCommGetAsyncError) {
        (Some(begin), Some(ask)) if version >= VERSION_CONFIG => {
            polled(table, device, place, (begin, ask), &patience)
        }
        _ => beside(table, device, place, &patience),
    }
}

/// Begins, and asks until it is done.
fn polled(
    table: &Table,
    device: &Arc<dyn Device>,
    Place { id, rank, size }: Place,
    (begin, ask): (BeginFn, AskFn),
    patience: &Patience<'_>,
) -> Result<CommHandle, ExchangeError> {
    let (mut comm, mut config, mut code): (Comm, _, _) = (ptr::null_mut(), Config::not_blocking(), 0);
    device.enter(&mut || {
        // SAFETY: writes one handle; the identifier is the one that rank 0 made, every rank calls this once, and the library copies the
        // configuration.
        code = unsafe { begin(&raw mut comm, size, id, rank, &raw mut config) };
    })?;
    let is_done = || {
        let mut state = 0;
        // SAFETY: the communicator was begun and is not aborted; writes one integer.
        let code = unsafe { ask(comm, &raw mut state) };
        table.check("ncclCommGetAsyncError", Some(comm), code)?;
        table.check("ncclCommInitRankConfig", Some(comm), state)?;
        Ok::<_, ExchangeError>(state != IN_PROGRESS)
    };
    let begun = table.check("ncclCommInitRankConfig", None, code);
    let made = begun.and_then(|()| {
        while !is_done()? {
            patience.check()?;
            thread::sleep(INIT_POLL);
        }
        Ok(CommHandle(comm))
    });
    if made.is_err() && !comm.is_null() {
        CommHandle(comm).abort(table);
    }
    made
}

/// Lets a library that knows no other way wait on a thread of its own, which is left behind when nobody is to come any more: nothing ends
/// the call. Should it end all the same, the thread lets go of what it made.
fn beside(
    table: &Arc<Table>,
    device: &Arc<dyn Device>,
    Place { id, rank, size }: Place,
    patience: &Patience<'_>,
) -> Result<CommHandle, ExchangeError> {
    // Without room in it, so that what is sent was received, or comes back.
    let (sender, receiver) = mpsc::sync_channel(0);
    let (table, device) = (Arc::clone(table), Arc::clone(device));
    let init = move || {
        let (mut comm, mut code) = (ptr::null_mut(), 0);
        let entered = device.enter(&mut || {
            // SAFETY: writes one handle; the identifier is the one that rank 0 made, and every rank calls this once.
            code = unsafe { (table.ncclCommInitRank)(&raw mut comm, size, id, rank) };
        });
        let made = entered.map_err(ExchangeError::Device).and_then(|()| {
            table.check("ncclCommInitRank", None, code)?;
            Ok(CommHandle(comm))
        });
        if let Err(SendError(Ok(unwanted))) = sender.send(made) {
            unwanted.abort(&table);
        }
    };
    let started = thread::Builder::new().name("tensorhaul-init".to_owned()).spawn(init);
    started.map_err(|source| ExchangeError::Thread { doing: "connecting the ranks", source })?;
    loop {
        match receiver.recv_timeout(INIT_POLL) {
            Ok(made) => return made,
            Err(RecvTimeoutError::Timeout) => patience.check()?,
            Err(RecvTimeoutError::Disconnected) => unreachable!("the thread sends before it ends"),
        }
    }
}

/// How long the other ranks are waited for.
struct Patience<'c> {
    control: &'c Control,
    until: Instant,
}

impl Patience<'_> {
    fn check(&self) -> Result<(), ExchangeError> {
        self.control.check()?;
        if Instant::now() < self.until {
            return Ok(());
        }
        let (after, missing) = (self.control.timeout(), Vec::new());
        Err(ExchangeError::TimedOut { doing: "connecting the ranks", after, missing })
    }
}

/// How often it is asked whether a communicator is made, which takes tens of milliseconds at least.
const INIT_POLL: Duration = Duration::from_millis(2);
