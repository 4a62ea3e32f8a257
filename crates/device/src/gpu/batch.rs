//! Many small copies at once: in one call of the driver, or by a kernel.

use std::sync::atomic::Ordering;

use super::driver::{BatchPiece, Driver, Meaning};
use super::{Gpu, within};
use crate::contract::{DeviceError, Piece, Stream};

impl<D: Driver> Gpu<D> {
    /// Queues several copies in one call of the driver, or in one kernel; false when neither can be had.
    ///
    /// # Safety
    /// As for [`Device::copy_pieces`].
    pub(super) unsafe fn copy_at_once(
        &self,
        source: &[u8],
        pieces: &[Piece<'_>],
        stream: Stream,
    ) -> Result<bool, DeviceError> {
        let shared = &*self.shared;
        let has_batches = shared.batches.load(Ordering::Relaxed);
        let has_scatter = shared.scatters.load(Ordering::Relaxed) && is_for_scatter(source, pieces);
        if !has_batches && !has_scatter {
            return Ok(false);
        }
        let batch: Vec<_> = pieces
            .iter()
            .map(|piece| BatchPiece {
                target: within(piece.target, piece.target_offset_bytes, piece.len_bytes as u64),
                source: piece.source(source).as_ptr().cast(),
                len_bytes: piece.len_bytes,
            })
            .collect();
        let stream = shared.stream(stream);
        let _bound = shared.bind()?;
        if has_batches {
            // SAFETY: the caller's promise for every piece.
            match unsafe { shared.driver.copy_in_batch(&batch, stream) } {
                Some(Ok(())) => return Ok(true),
                Some(Err(error)) if error.meaning != Meaning::Other => return Err(shared.failed(error)),
                // Copying a piece twice is harmless; going on in batches that are refused is not.
                Some(Err(error)) => {
                    shared.batches.store(false, Ordering::Relaxed);
                    let what = match has_scatter {
                        true => "small tensors are moved by a kernel instead of in batches",
                        false => "small tensors are copied one by one instead of in batches",
                    };
                    shared.note(what, error.to_string());
                }
                None => shared.batches.store(false, Ordering::Relaxed),
            }
        }
        if has_scatter {
            // SAFETY: the caller's promise for every piece; `is_for_scatter` knows the distances.
            match unsafe { shared.scatter(source.as_ptr().cast(), &batch, stream) } {
                Ok(()) => return Ok(true),
                Err(error) if is_refusal(&error) => {
                    shared.scatters.store(false, Ordering::Relaxed);
                    shared.note(
                        "small tensors are copied one by one instead of by a kernel",
                        error.to_string(),
                    );
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

/// Tells whether pieces are many and small enough that a kernel, which reads across the link itself, beats single copies.
fn is_for_scatter(source: &[u8], pieces: &[Piece<'_>]) -> bool {
    let len_bytes: usize = pieces.iter().map(|piece| piece.len_bytes).sum();
    pieces.len() >= SCATTER_MIN
        && len_bytes / pieces.len() < SCATTER_MEAN_LEN_BYTES
        && u32::try_from(source.len()).is_ok()
}

/// Tells whether the driver refused a kernel, but not the device.
fn is_refusal(error: &DeviceError) -> bool {
    match error {
        DeviceError::NoKernels { .. } | DeviceError::NotCompiled { .. } => true,
        DeviceError::Driver { error, .. } => !matches!(error.meaning, Meaning::Lost | Meaning::OutOfMemory),
        _ => false,
    }
}

/// Below this, single copies cost no more calls than loading a module does.
const SCATTER_MIN: usize = 8;

/// From here on a copy's bytes take longer than its call, some 5 us at 12 GB/s, and copy engines read faster than kernels.
const SCATTER_MEAN_LEN_BYTES: usize = 64 << 10;
