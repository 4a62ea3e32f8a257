//! Checksums of tensors, computed on threads of their own while later bytes arrive.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;

use tensorhaul_plan::DeviceId;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Tensor;

/// Takes tensors to hash; does nothing when no checksums are asked for.
pub(crate) struct Hashing {
    sender: Option<Sender<Work>>,
}

/// What tensors of one name on several devices are of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Namesakes {
    /// The same tensor, which has one checksum.
    Copies,
    /// Parts of it, of several ranks, each with its own.
    Parts,
}

/// A name, what namesakes of the tensor are, and the tensor.
type Work = (String, Namesakes, Tensor);

struct Hashed {
    name: String,
    namesakes: Namesakes,
    device: DeviceId,
    sum: u64,
}

impl Hashing {
    pub(crate) fn add(&self, name: &str, namesakes: Namesakes, tensor: &Tensor) {
        if let Some(sender) = &self.sender {
            let work = (name.to_owned(), namesakes, tensor.clone());
            // Threads that gave up have an error to return, which the join below finds.
            let _ = sender.send(work);
        }
    }
}

/// Runs `load` beside hashing threads, and returns the checksums of what it added once all are done.
///
/// # Errors
/// Those of `load`; of reading back what devices hold; [`ErrorKind::Device`] when copies of a tensor differ.
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
        let hashed = threads.into_iter().map(|thread| thread.join().expect("hashing does not panic"));
        let hashed: Vec<_> = hashed.collect();
        result?; // What a load failed of comes before what could then not be read back.
        let hashed = hashed.into_iter().collect::<Result<Vec<_>>>()?;
        join(hashed.into_iter().flatten().collect()).map(Some)
    })
}

fn hash(receiver: &Mutex<Receiver<Work>>) -> Result<Vec<Hashed>> {
    let next = || receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
    let mut hashed = Vec::new();
    while let Ok((name, namesakes, tensor)) = next() {
        // What a device holds is read back, so that the checksum is of what arrived.
        let sum = match tensor.bytes() {
            Ok(bytes) => xxh3_64(bytes),
            Err(_) => xxh3_64(&tensor.to_host()?),
        };
        hashed.push(Hashed { name, namesakes, device: tensor.device(), sum });
    }
    Ok(hashed)
}

/// Joins what was hashed on all devices: a name has one checksum, of which every copy has the same, and of parts each further one an entry
/// of its own.
fn join(mut hashed: Vec<Hashed>) -> Result<BTreeMap<String, String>> {
    hashed.sort_unstable_by(|a, b| (&a.name, a.device).cmp(&(&b.name, b.device)));
    let mut firsts: BTreeMap<String, (DeviceId, u64)> = BTreeMap::new();
    let mut parts = BTreeMap::new();
    for Hashed { name, namesakes, device, sum } in hashed {
        match firsts.entry(name) {
            Entry::Vacant(entry) => drop(entry.insert((device, sum))),
            Entry::Occupied(entry) if entry.get().1 == sum => {}
            Entry::Occupied(entry) if namesakes == Namesakes::Parts => {
                parts.insert(format!("{} on {device}", entry.key()), text(sum));
            }
            Entry::Occupied(entry) => {
                let (first, first_sum) = *entry.get();
                let what = format!(
                    "its copies differ: checksum {} on {first}, {} on {device}; load again, and test the devices if it stays so",
                    text(first_sum),
                    text(sum)
                );
                return Err(Error::new(ErrorKind::Device, what).about_tensor(entry.key()));
            }
        }
    }
    let firsts = firsts.into_iter().map(|(name, (_, sum))| (name, text(sum)));
    Ok(firsts.chain(parts).collect())
}

fn text(sum: u64) -> String {
    format!("{sum:016x}")
}

/// A core hashes about 15 GB/s; four pass what a disk or the page cache gives.
const THREADS_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn hashed(name: &str, namesakes: Namesakes, ordinal: u32, sum: u64) -> Hashed {
        Hashed { name: name.to_owned(), namesakes, device: DeviceId::Cuda(ordinal), sum }
    }

    #[test]
    fn copies_have_one_checksum_or_fail_the_load() {
        let copy = |ordinal, sum| hashed("w", Namesakes::Copies, ordinal, sum);
        let same = join(vec![copy(1, 7), hashed("v", Namesakes::Copies, 0, 8), copy(0, 7)]).unwrap();
        assert_eq!(
            same.into_iter().collect::<Vec<_>>(),
            [("v".to_owned(), text(8)), ("w".to_owned(), text(7))]
        );
        let error = join(vec![copy(2, 7), copy(1, 9), copy(0, 7)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert_eq!(
            error.one_line(),
            "tensor \"w\": its copies differ: checksum 0000000000000007 on cuda:0, 0000000000000009 on cuda:1; \
             load again, and test the devices if it stays so"
        );
    }

    #[test]
    fn parts_of_a_tensor_have_a_checksum_each() {
        let part = |ordinal, sum| hashed("w", Namesakes::Parts, ordinal, sum);
        let sums: Vec<_> = join(vec![part(1, 9), part(0, 7), part(2, 7)]).unwrap().into_iter().collect();
        assert_eq!(sums, [("w".to_owned(), text(7)), ("w on cuda:1".to_owned(), text(9))]);
    }
}
