//! The ring: buffers that go round, one owner at a time.

use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::layout::Layout;
use crate::memory::{HostMemory, StagingMemory};
use crate::node::Placement;

/// A fixed set of equal staging buffers. Clones are handles of the same ring.
#[derive(Clone)]
pub struct Ring {
    shared: Arc<Shared>,
}

struct Shared {
    layout: Layout,
    state: Mutex<State>,
    freed: Condvar,
    /// Dropped last, after every buffer that points into it.
    memory: Memory,
}

/// What the buffers are cut from.
enum Memory {
    /// Memory that a device copies from, from the start.
    Pinned(Box<dyn StagingMemory>),
    /// The host's own, and the same bytes as a device pinned them, once it has.
    Own { pinned: OnceLock<Box<dyn StagingMemory>>, memory: Arc<HostMemory> },
}

struct State {
    free: Vec<u32>,
    leaked: u32,
    peak_taken: u32,
    closed: bool,
}

impl Ring {
    /// Cuts memory that a device copies from into the buffers of a layout.
    ///
    /// # Panics
    /// When the memory is shorter than the layout.
    pub fn new(memory: impl StagingMemory + 'static, layout: Layout) -> Ring {
        Ring::from_boxed(Box::new(memory), layout)
    }

    /// Cuts memory that a device backend allocated.
    ///
    /// # Panics
    /// When the memory is shorter than the layout.
    pub fn from_boxed(memory: Box<dyn StagingMemory>, layout: Layout) -> Ring {
        Ring::cut(Memory::Pinned(memory), layout)
    }

    /// Cuts host memory that no device copies from yet: its buffers are filled at once, and copied once the
    /// memory [is pinned](Ring::pin).
    ///
    /// # Panics
    /// When the memory is shorter than the layout.
    pub fn unpinned(memory: HostMemory, layout: Layout) -> Ring {
        Ring::cut(Memory::Own { pinned: OnceLock::new(), memory: Arc::new(memory) }, layout)
    }

    fn cut(memory: Memory, layout: Layout) -> Ring {
        assert!(memory.bytes().len_bytes() >= layout.len_bytes(), "the ring's memory holds its layout");
        let free = (0..layout.buffer_count()).rev().collect();
        let state = Mutex::new(State { free, leaked: 0, peak_taken: 0, closed: false });
        Ring { shared: Arc::new(Shared { layout, state, freed: Condvar::new(), memory }) }
    }

    /// Waits for a free buffer; `None` once the ring is closed.
    pub fn take(&self) -> Option<Filling> {
        let mut state = self.shared.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(buffer) = self.pop(&mut state) {
                return Some(buffer);
            }
            state = self.shared.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a buffer if one is free and the ring is open.
    pub fn try_take(&self) -> Option<Filling> {
        let mut state = self.shared.lock();
        if state.closed { None } else { self.pop(&mut state) }
    }

    /// Closes the ring: whoever waits for a buffer gets `None`. Buffers that are out come back as usual.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.freed.notify_all();
    }

    /// Tells whether the ring was closed.
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Tells whether every buffer is back.
    pub fn is_whole(&self) -> bool {
        self.shared.lock().free.len() == self.shared.layout.buffer_count() as usize
    }

    /// Returns how many buffers were given up because a device might still have touched them.
    pub fn leaked_count(&self) -> u32 {
        self.shared.lock().leaked
    }

    /// Returns the bytes of the most buffers that were ever out at once.
    pub fn peak_bytes(&self) -> u64 {
        u64::from(self.shared.lock().peak_taken) * self.shared.layout.buffer_len_bytes() as u64
    }

    /// Counts [`Ring::peak_bytes`] anew from what is out now.
    pub fn reset_peak(&self) {
        let mut state = self.shared.lock();
        state.peak_taken = self.shared.layout.buffer_count() - state.free.len() as u32;
    }

    /// Returns the buffers' length and number.
    pub fn layout(&self) -> Layout {
        self.shared.layout
    }

    /// Returns the whole block the buffers are cut from, for registering it with a kernel or a driver.
    pub fn memory(&self) -> &dyn StagingMemory {
        self.shared.memory.bytes()
    }

    /// Returns where the system was asked to put the memory; anywhere, where somebody else allocated it.
    pub fn placement(&self) -> Placement {
        match &self.shared.memory {
            Memory::Own { memory, .. } => memory.placement(),
            Memory::Pinned(_) => Placement::Anywhere,
        }
    }

    /// Lets a device pin the memory where it is, also while buffers of it are being filled. `None` when the device
    /// refused. A ring that is pinned already does not ask again.
    ///
    /// # Errors
    /// Those of `pin`, which returns the same bytes pinned, or `None`.
    ///
    /// # Panics
    /// When `pin` returns other bytes, or two threads pin at once.
    pub fn pin<E>(
        &self,
        pin: impl FnOnce(Arc<HostMemory>) -> Result<Option<Box<dyn StagingMemory>>, E>,
    ) -> Result<Option<Pinned>, E> {
        if let Memory::Own { pinned, memory } = &self.shared.memory
            && pinned.get().is_none()
        {
            let Some(bytes) = pin(Arc::clone(memory))? else { return Ok(None) };
            let (start, len_bytes) = (memory.as_ptr(), self.shared.layout.len_bytes());
            assert!(
                bytes.as_ptr() == start && bytes.len_bytes() >= len_bytes,
                "the ring's own bytes are pinned"
            );
            assert!(pinned.set(bytes).is_ok(), "one thread pins a ring");
        }
        Ok(self.pinned())
    }

    /// Returns the proof that a device may copy from the ring's buffers; `None` while they are not pinned.
    pub fn pinned(&self) -> Option<Pinned> {
        match &self.shared.memory {
            Memory::Own { pinned, .. } if pinned.get().is_none() => None,
            _ => Some(Pinned { shared: Arc::clone(&self.shared) }),
        }
    }

    fn pop(&self, state: &mut State) -> Option<Filling> {
        let index = state.free.pop()?;
        let taken = self.shared.layout.buffer_count() - state.free.len() as u32;
        state.peak_taken = state.peak_taken.max(taken);
        Some(Filling(Buffer { shared: Arc::clone(&self.shared), index }))
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.shared.lock().free.len();
        write!(
            f,
            "Ring({free} of {} buffers free, {} bytes each)",
            self.layout().buffer_count(),
            self.layout().buffer_len_bytes()
        )
    }
}

impl Memory {
    fn bytes(&self) -> &dyn StagingMemory {
        match self {
            Memory::Pinned(memory) => &**memory,
            Memory::Own { memory, .. } => &**memory,
        }
    }
}

impl Shared {
    /// A panic elsewhere cannot leave the state half changed: every change is one assignment or push.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer out of the ring; goes back when dropped.
struct Buffer {
    shared: Arc<Shared>,
    index: u32,
}

impl Buffer {
    fn ptr(&self) -> NonNull<u8> {
        let offset_bytes = self.index as usize * self.shared.layout.buffer_len_bytes();
        // SAFETY: `index` is below the layout's count, and the memory holds the whole layout.
        unsafe { self.shared.memory.bytes().as_ptr().add(offset_bytes) }
    }

    fn len_bytes(&self) -> usize {
        self.shared.layout.buffer_len_bytes()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.shared.lock().free.push(self.index);
        self.shared.freed.notify_one();
    }
}

/// A buffer that an engine fills.
pub struct Filling(Buffer);

impl Filling {
    /// Returns the whole buffer to write into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory is initialized, and this value is the only owner of the buffer's range.
        unsafe { std::slice::from_raw_parts_mut(self.0.ptr().as_ptr(), self.0.len_bytes()) }
    }

    /// Returns the address, for a kernel that fills the buffer on its own; keep the value until it has.
    pub fn as_ptr(&mut self) -> NonNull<u8> {
        self.0.ptr()
    }

    /// Returns the length of the buffer.
    pub fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }

    /// Returns which buffer of the ring this is.
    pub fn index(&self) -> u32 {
        self.0.index
    }

    /// States that the first `len_bytes` hold what was asked for.
    ///
    /// # Panics
    /// When that is more than the buffer.
    pub fn filled(self, len_bytes: usize) -> Filled {
        assert!(len_bytes <= self.0.len_bytes());
        Filled { buffer: self.0, len_bytes }
    }
}

/// A buffer whose first bytes hold what was read.
pub struct Filled {
    buffer: Buffer,
    len_bytes: usize,
}

impl Filled {
    /// Returns the bytes read.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is initialized, the length was checked, and nobody writes to a filled buffer.
        unsafe { std::slice::from_raw_parts(self.buffer.ptr().as_ptr(), self.len_bytes) }
    }

    /// Hands the buffer to a device that reads it while this value exists.
    ///
    /// # Panics
    /// When the proof is of another ring.
    pub fn copying(self, pinned: &Pinned) -> Copying {
        assert!(Arc::ptr_eq(&self.buffer.shared, &pinned.shared), "the proof is of the buffer's own ring");
        Copying { filled: Some(self) }
    }
}

/// The proof that a ring's memory is pinned: without it no buffer can be [copied](Filled::copying).
///
/// A copy from memory that is not pinned is no asynchronous one: the driver then waits for it, or copies it twice.
pub struct Pinned {
    shared: Arc<Shared>,
}

/// A buffer that a device may still be reading. Dropping it leaks it; see [`Copying::copied`].
pub struct Copying {
    filled: Option<Filled>,
}

impl Copying {
    /// Returns the bytes being copied.
    pub fn bytes(&self) -> &[u8] {
        self.filled.as_ref().map_or(&[], Filled::bytes)
    }

    /// Gives the buffer back. Call it only once the event recorded after its last copy is complete.
    pub fn copied(mut self) {
        drop(self.filled.take());
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        if let Some(filled) = self.filled.take() {
            filled.buffer.shared.lock().leaked += 1;
            // The handle to the ring's memory leaks with it: the device may write or read there for ever.
            std::mem::forget(filled);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::HostMemory;

    fn ring(buffer_count: usize) -> Ring {
        let layout = Layout::new(buffer_count * 4096, 4096).unwrap();
        assert_eq!(layout.buffer_count() as usize, buffer_count);
        Ring::new(HostMemory::allocate(layout.len_bytes()).unwrap(), layout)
    }

    #[test]
    fn buffers_come_back_from_every_state() {
        let ring = ring(3);
        let (mut a, b, c) = (ring.take().unwrap(), ring.take().unwrap(), ring.take().unwrap());
        assert!(ring.try_take().is_none());
        a.bytes_mut()[0] = 7;
        drop(b.filled(0));
        let a = a.filled(1).copying(&ring.pinned().unwrap());
        assert_eq!(a.bytes(), [7]);
        a.copied();
        drop(c);
        assert!(ring.is_whole());
        assert_eq!(ring.leaked_count(), 0);
        assert_eq!(ring.peak_bytes(), 3 * 4096);
    }

    #[test]
    fn a_buffer_dropped_while_copied_is_leaked_and_never_reused() {
        let ring = ring(2);
        drop(ring.take().unwrap().filled(10).copying(&ring.pinned().unwrap()));
        assert_eq!(ring.leaked_count(), 1);
        assert!(!ring.is_whole());
        let _last = ring.take().unwrap();
        assert!(ring.try_take().is_none());
    }

    #[test]
    fn a_ring_is_filled_before_it_is_pinned_and_copied_only_after() {
        let layout = Layout::new(2 * 4096, 4096).unwrap();
        let ring = Ring::unpinned(HostMemory::allocate(layout.len_bytes()).unwrap(), layout);
        let mut filling = ring.take().unwrap();
        filling.bytes_mut()[0] = 7;
        let filled = filling.filled(1);
        assert!(ring.pinned().is_none());
        assert!(ring.pin(|_| Ok::<_, ()>(None)).unwrap().is_none(), "a refusal is no pin");
        assert!(ring.pin(|_| Err("lost")).is_err());
        let pinned = ring.pin(|memory| Ok::<_, ()>(Some(Box::new(memory)))).unwrap().unwrap();
        let copying = filled.copying(&pinned);
        assert_eq!(copying.bytes(), [7]);
        copying.copied();
        assert!(ring.pin(|_| Err("asked again")).unwrap().is_some());
        assert!(ring.is_whole());
    }

    #[test]
    #[should_panic(expected = "the proof is of the buffer's own ring")]
    fn a_proof_is_of_one_ring() {
        let (ours, other) = (ring(1), ring(1));
        ours.take().unwrap().filled(0).copying(&other.pinned().unwrap()).copied();
    }

    #[test]
    fn taking_waits_for_a_buffer_to_come_back() {
        let ring = ring(1);
        let held = ring.take().unwrap();
        let waiter = thread::spawn({
            let ring = ring.clone();
            move || ring.take().map(|buffer| buffer.index())
        });
        drop(held);
        assert_eq!(waiter.join().unwrap(), Some(0));
    }

    #[test]
    fn closing_wakes_whoever_waits() {
        let ring = ring(1);
        let held = ring.take().unwrap();
        let waiter = thread::spawn({
            let ring = ring.clone();
            move || ring.take().is_none()
        });
        ring.close();
        assert!(waiter.join().unwrap());
        assert!(ring.try_take().is_none());
        drop(held);
        assert!(ring.is_whole());
    }

    #[test]
    fn buffers_do_not_overlap() {
        let ring = ring(4);
        let mut buffers: Vec<_> = std::iter::from_fn(|| ring.try_take()).collect();
        for (value, buffer) in buffers.iter_mut().enumerate() {
            buffer.bytes_mut().fill(value as u8);
        }
        for (value, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.bytes_mut().iter().all(|byte| *byte == value as u8));
        }
    }
}
