//! The staging ring: fixed, equal, aligned host buffers between storage and device.
//!
//! A ring is one block of [`StagingMemory`] cut into equal buffers. A buffer is a value that moves
//! along the flow, and its type says where it is:
//!
//! ```text
//! free ──take──▶ Filling ──filled──▶ Filled ──copying──▶ Copying ──copied──▶ free
//! ```
//!
//! - An engine writes into a [`Filling`] buffer. Dropping it gives it back.
//! - A [`Filled`] buffer is read by whoever places the bytes. Dropping it gives it back.
//! - A device may still be reading a [`Copying`] buffer, so dropping that one **leaks** it: memory
//!   that hardware may touch is never reused. [`Copying::copied`] gives it back once its event is complete.
//!
//! - Only a ring whose memory is [`Pinned`] has buffers that are copied. Storage may fill them before: pinning takes
//!   tenths of a second, and a driver's context, without which there is no pinning, takes as long again.
//!
//! When no buffer is free, [`Ring::take`] waits. Nothing grows.
//!
//! # Example
//! ```
//! use tensorhaul_stage::{HostMemory, Layout, Ring};
//!
//! let layout = Layout::new(1 << 20, 4096)?;
//! let ring = Ring::new(HostMemory::allocate(layout.len_bytes())?, layout);
//! let mut filling = ring.take().expect("the ring is open");
//! filling.bytes_mut()[..5].copy_from_slice(b"bytes");
//! let filled = filling.filled(5);
//! assert_eq!(filled.bytes(), b"bytes");
//! drop(filled);
//! assert!(ring.is_whole());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod layout;
mod memory;
mod node;
mod ring;

pub use layout::{BUFFER_LEN_BYTES_MIN, Layout, LayoutError};
pub use memory::{AllocateError, HUGE_PAGE_BYTES, HostMemory, StagingMemory};
pub use node::Placement;
pub use ring::{Copying, Filled, Filling, Pinned, Ring};
