//! Checksums of tensors, computed on threads of their own while later bytes arrive.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::Result;
use crate::tensor::Tensor;

/// Takes tensors to hash; does nothing when no checksums are asked for.
pub(crate) struct Hashing {
    sender: Option<Sender<(String, Tensor)>>,
}

impl Hashing {
    pub(crate) fn add(&self, name: &str, tensor: &Tensor) {
        if let Some(sender) = &self.sender {
            let work = (name.to_owned(), tensor.clone());
            // Threads that gave up have an error to return, which the join below finds.
            let _ = sender.send(work);
        }
    }
}

/// Runs `load` beside hashing threads, and returns the checksums of what it added once all are done.
pub(crate) fn with_pool(
    wanted: bool,
    load: impl FnOnce(&Hashing) -> Result<()>,
) -> Result<Option<BTreeMap<String, String>>> {
    if !wanted {
        load(&Hashing { sender: None })?;
        return Ok(None);
    }
    let (sender, receiver) = mpsc::channel();
    let receiver = Mutex::new(receiver);
    thread::scope(|scope| {
        let count = thread::available_parallelism().map_or(1, |cores| cores.get()).min(THREADS_MAX);
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| hash(&receiver))).collect();
        let hashing = Hashing { sender: Some(sender) };
        let result = load(&hashing);
        drop(hashing);
        let mut checksums = BTreeMap::new();
        for thread in threads {
            checksums.extend(thread.join().expect("hashing does not panic")?);
        }
        result.map(|()| Some(checksums))
    })
}

fn hash(receiver: &Mutex<Receiver<(String, Tensor)>>) -> Result<Vec<(String, String)>> {
    let next = || receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
    let mut hashed = Vec::new();
    while let Ok((name, tensor)) = next() {
        // What a device holds is read back, so that the checksum is of what arrived.
        let checksum = match tensor.bytes() {
            Ok(bytes) => xxh3_64(bytes),
            Err(_) => xxh3_64(&tensor.to_host()?),
        };
        hashed.push((name, format!("{checksum:016x}")));
    }
    Ok(hashed)
}

/// A core hashes about 15 GB/s; four pass what a disk or the page cache gives.
const THREADS_MAX: usize = 4;
