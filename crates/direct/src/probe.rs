//! Whether storage reads a file straight into a device: found out by doing it once.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tensorhaul_device::{Allocation, Device, STORAGE_ALIGN_BYTES, Stream};
use tensorhaul_io::OpenFile;
use tensorhaul_stage::StagingMemory;

use crate::library::Library;
use crate::refusal::Refusal;
use crate::registered::Registered;

/// A file that direct storage has read from.
pub struct DirectFile {
    pub(crate) registered: Arc<Registered>,
    pub(crate) number: u32,
    /// Keeps the descriptors open that are registered.
    pub(crate) files: Arc<[OpenFile]>,
}

/// Tries files one after another, into one page of a device's memory.
pub struct Probe {
    library: Arc<Library>,
    device: Arc<dyn Device>,
    memory: Arc<dyn Allocation>,
    /// Let go of only when the device provably has.
    staging: ManuallyDrop<Box<dyn StagingMemory>>,
    is_lost: Cell<bool>,
}

impl Probe {
    /// Takes the memory that first reads need.
    ///
    /// # Errors
    /// [`Refusal::Device`] when the device does not give it.
    pub fn new(library: &Arc<Library>, device: &Arc<dyn Device>) -> Result<Probe, Refusal> {
        Ok(Probe {
            library: Arc::clone(library),
            device: Arc::clone(device),
            memory: device.allocate_for_storage(PAGE_LEN_BYTES as u64).map_err(Refusal::Device)?,
            staging: ManuallyDrop::new(device.staging_memory(PAGE_LEN_BYTES).map_err(Refusal::Device)?),
            is_lost: Cell::new(false),
        })
    }

    /// Tries one of the files: a descriptor with `O_DIRECT`, the library's consent, and a first page that arrives in the device as an
    /// ordinary read sees it.
    ///
    /// # Errors
    /// What stood in the way. The file is read through the staging ring then.
    ///
    /// # Panics
    /// When there is no file of that number.
    pub fn try_file(&self, files: &Arc<[OpenFile]>, number: u32) -> Result<DirectFile, Refusal> {
        let file = &files[number as usize];
        if file.len_bytes() < PAGE_LEN_BYTES as u64 {
            return Err(Refusal::TooShort { len_bytes: file.len_bytes() });
        }
        file.probe_direct().map_err(|refusal| Refusal::NoDirectReads { why: refusal.to_string() })?;
        let (descriptor, _) = file.direct().expect("a file just proven is open for direct reads");
        let mut tried = None;
        let inside = self.device.enter(&mut || {
            let registered =
                Registered::file(&self.library, &self.device, descriptor).map_err(Refusal::Register);
            tried = Some(registered.and_then(|registered| {
                self.compare(file, &registered)?;
                Ok(registered)
            }));
        });
        inside.map_err(Refusal::Device)?;
        let registered = tried.expect("what runs inside a device runs")?;
        Ok(DirectFile { registered, number, files: Arc::clone(files) })
    }

    /// Reads the first page both ways. The device's page holds the opposite before, so that a read that does nothing is seen.
    fn compare(&self, file: &OpenFile, registered: &Registered) -> Result<(), Refusal> {
        let first_read = |why: String| Refusal::FirstRead { vendor: self.library.vendor(), why };
        let mut expected = [0; PAGE_LEN_BYTES];
        let read = file.cached().read_exact_at(&mut expected, 0);
        read.map_err(|error| Refusal::NoDirectReads { why: error.to_string() })?;

        // SAFETY: staging memory is initialized, a page long, and this value's alone; no copy of it is queued here.
        let staged =
            unsafe { std::slice::from_raw_parts_mut(self.staging.as_ptr().as_ptr(), PAGE_LEN_BYTES) };
        staged.iter_mut().zip(&expected).for_each(|(staged, expected)| *staged = !expected);
        // SAFETY: both live until the wait below; nobody else touches them.
        unsafe { self.device.copy(staged, &self.memory, 0, Stream::Copy) }.map_err(Refusal::Device)?;
        self.wait()?;

        let (base, len) = (self.memory.address(), PAGE_LEN_BYTES);
        // SAFETY: the file is registered, the memory is the current device's, as long, and nobody else's.
        let read = unsafe { self.library.read(registered.handle(), base, 0, 0, len) };
        let read = read.map_err(|error| match self.device.memory() {
            // Whatever the library calls it.
            Err(lost) if lost.is_lost() => Refusal::Device(lost),
            _ => first_read(error.to_string()),
        })?;
        if read != len as u64 {
            return Err(first_read(format!("{read} of {len} bytes came")));
        }

        // SAFETY: as above.
        unsafe { self.device.copy_back(&self.memory, 0, staged, Stream::Copy) }.map_err(Refusal::Device)?;
        self.wait()?;
        if *staged == expected { Ok(()) } else { Err(Refusal::Mismatch) }
    }

    fn wait(&self) -> Result<(), Refusal> {
        let wait = || self.device.record(Stream::Copy).and_then(|event| self.device.wait(&event));
        wait().map_err(|error| {
            self.is_lost.set(wait().is_err());
            Refusal::Device(error)
        })
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if !self.is_lost.get() {
            // SAFETY: dropped here and nowhere else; no copy from or to it is queued.
            unsafe { ManuallyDrop::drop(&mut self.staging) };
        }
    }
}

const PAGE_LEN_BYTES: usize = STORAGE_ALIGN_BYTES as usize;
