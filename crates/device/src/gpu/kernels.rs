//! Operations as kernels: which one, with what parameters, on how many threads.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tensorhaul_plan::Dtype;

use super::driver::{
    BatchPiece, CompileError, Compiled, Driver, FunctionHandle, LaunchShape, ModuleHandle, StreamHandle,
};
use super::params::{
    CastParams, Kernel, Params, SCATTER_PIECES_MAX, ScatterParams, ScatterPiece, StridedParams, dtype_code,
};
use super::{Shared, lock};
use crate::cast::can_cast;
use crate::contract::DeviceError;
use crate::operation::{Cast, Operation, OperationKind, Strided};

/// The modules of a device that were needed so far, and their kernels.
///
/// Loading takes milliseconds, more where the driver compiles. It runs under the lock, so that threads that
/// need the same module wait for it instead of loading it again.
#[derive(Default)]
pub(super) struct Modules {
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: BTreeMap<&'static str, ModuleHandle>,
    functions: BTreeMap<&'static CStr, FunctionHandle>,
}

impl<D: Driver> Shared<D> {
    /// Loads what a kind of operation needs. The device is current.
    pub(super) fn prepare(&self, kind: OperationKind) -> Result<Duration, DeviceError> {
        match kind {
            OperationKind::Cast => self.load(CastParams::KERNEL).map(|(_, time)| time),
            OperationKind::Strided => self.load(StridedParams::KERNEL).map(|(_, time)| time),
            OperationKind::Dequantize => self.prepare_dequantize(),
        }
    }

    /// Queues an operation. The device is current.
    ///
    /// # Safety
    /// As for [`Device::run`](crate::Device::run).
    pub(super) unsafe fn run(
        &self,
        operation: &Operation<'_>,
        stream: StreamHandle,
    ) -> Result<(), DeviceError> {
        match operation {
            // SAFETY: the caller's promise.
            Operation::Cast(cast) => unsafe { self.run_cast(cast, stream) },
            // SAFETY: as above.
            Operation::Strided(strided) => unsafe { self.run_strided(strided, stream) },
            // SAFETY: as above.
            Operation::Dequantize(dequantize) => unsafe { self.run_dequantize(dequantize, stream) },
        }
    }

    /// # Safety
    /// As for [`Shared::run`].
    unsafe fn run_cast(&self, cast: &Cast<'_>, stream: StreamHandle) -> Result<(), DeviceError> {
        let (from, to) = (cast.source_dtype, cast.target_dtype);
        assert!(can_cast(from, to), "{from} cannot be cast to {to}");
        if cast.numel == 0 {
            return Ok(());
        }
        if (from, to) == (Dtype::F64, Dtype::F64) {
            // The kernel's values are F32.
            let len_bytes = cast.source_len_bytes();
            let whole = Strided {
                source: cast.source,
                source_stride_bytes: len_bytes,
                target: cast.target,
                target_stride_bytes: len_bytes,
                piece_len_bytes: len_bytes,
                piece_count: 1,
            };
            // SAFETY: the caller's promise.
            return unsafe { self.run_strided(&whole, stream) };
        }
        let params = CastParams {
            source: cast.source.range(cast.source_len_bytes()),
            target: cast.target.range(cast.target_len_bytes()),
            numel: cast.numel,
            source_dtype: dtype_code(from),
            target_dtype: dtype_code(to),
        };
        // SAFETY: the ranges were just checked; that they live is the caller's promise.
        unsafe { self.launch(&params, cast.numel.div_ceil(CAST_ELEMENTS), stream) }
    }

    /// # Safety
    /// As for [`Shared::run`].
    unsafe fn run_strided(&self, strided: &Strided<'_>, stream: StreamHandle) -> Result<(), DeviceError> {
        let (piece_count, piece_len) = (strided.piece_count, strided.piece_len_bytes);
        if piece_count == 0 || piece_len == 0 {
            return Ok(());
        }
        let lanes_log2 = self.lanes_log2(piece_len);
        let params = StridedParams {
            source: strided.source.range(strided.source_reach_bytes()),
            target: strided.target.range(strided.target_reach_bytes()),
            source_stride: strided.source_stride_bytes,
            target_stride: strided.target_stride_bytes,
            piece_len,
            piece_count,
            lanes_log2,
            reserved: 0,
        };
        // SAFETY: the ranges were just checked; that they live is the caller's promise.
        unsafe { self.launch(&params, piece_count.saturating_mul(1 << lanes_log2), stream) }
    }

    /// Queues copies of pieces of one stretch of pinned memory. The device is current, and reads pinned memory.
    ///
    /// # Safety
    /// As for [`Driver::copy_in_batch`]; every piece lies behind `start`, less than 4 GiB away.
    pub(super) unsafe fn scatter(
        &self,
        start: *const c_void,
        pieces: &[BatchPiece],
        stream: StreamHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise: staging memory, which is pinned.
        let source = unsafe { self.driver.host_address(start) }.map_err(|error| self.failed(error))?;
        for pieces in pieces.chunks(SCATTER_PIECES_MAX) {
            let mean_len =
                pieces.iter().map(|piece| piece.len_bytes as u64).sum::<u64>() / pieces.len() as u64;
            let mut params = ScatterParams {
                source,
                piece_count: pieces.len() as u32,
                lanes_log2: self.lanes_log2(mean_len),
                reserved: 0,
                pieces: [ScatterPiece::default(); SCATTER_PIECES_MAX],
            };
            for (entry, piece) in params.pieces.iter_mut().zip(pieces) {
                *entry = ScatterPiece {
                    source_offset: (piece.source.addr() - start.addr()) as u32,
                    len: piece.len_bytes as u32,
                    target: piece.target,
                };
            }
            let threads = (pieces.len() as u64) << params.lanes_log2;
            // SAFETY: the caller's promise.
            unsafe { self.launch(&params, threads, stream)? };
        }
        Ok(())
    }

    /// Returns how many threads share a piece, as a power of two: each takes four vectors, so that their latencies overlap,
    /// and no more threads than run at once.
    fn lanes_log2(&self, piece_len_bytes: u64) -> u32 {
        let lanes = piece_len_bytes.div_ceil(4 * VECTOR_LEN_BYTES).max(1).next_power_of_two();
        lanes.ilog2().min(self.threads_max().ilog2())
    }

    /// Threads that run at once; kernels stride over the rest.
    pub(super) fn threads_max(&self) -> u64 {
        u64::from(self.facts.processor_count.max(1)) * PROCESSOR_THREADS
    }

    /// Queues a kernel on about this many threads.
    ///
    /// # Safety
    /// What the parameters point to is valid until the kernel is done.
    unsafe fn launch<P: Params>(
        &self,
        params: &P,
        threads: u64,
        stream: StreamHandle,
    ) -> Result<(), DeviceError> {
        let threads = threads.clamp(1, self.threads_max());
        let shape = LaunchShape {
            // Groups of threads are powers of two, so that a whole number of blocks holds a whole number of groups.
            block_count: threads.div_ceil(BLOCK_THREADS).next_power_of_two() as u32,
            block_threads: BLOCK_THREADS as u32,
            shared_bytes: 0,
        };
        // SAFETY: `P` is what the kernel takes; the rest is the caller's promise.
        unsafe { self.queue(P::KERNEL, shape, params.bytes(), stream) }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// `params` are the bytes of what it takes, and what they point to is valid until it is done.
    pub(super) unsafe fn queue(
        &self,
        kernel: Kernel,
        shape: LaunchShape,
        params: &[u8],
        stream: StreamHandle,
    ) -> Result<(), DeviceError> {
        let (function, _) = self.load(kernel)?;
        // SAFETY: the caller's promise.
        unsafe { self.driver.launch(function, shape, params, stream) }.map_err(|error| self.failed(error))
    }

    /// Returns a kernel, loaded now if it was not, and the time that took.
    pub(super) fn load(&self, kernel: Kernel) -> Result<(FunctionHandle, Duration), DeviceError> {
        let mut loaded = lock(&self.modules.loaded);
        if let Some(function) = loaded.functions.get(kernel.name) {
            return Ok((*function, Duration::ZERO));
        }
        let start = Instant::now();
        let module = match loaded.modules.get(kernel.module) {
            Some(module) => *module,
            None => {
                let image = match self.driver.kernels(&self.facts.architecture, kernel.module) {
                    Some(image) => image,
                    None => self.compile(kernel.module)?,
                };
                // SAFETY: the driver's own image.
                let module = unsafe { self.driver.module_load(image) }.map_err(|error| self.failed(error))?;
                loaded.modules.insert(kernel.module, module);
                module
            }
        };
        // SAFETY: loaded above or before, and unloaded only with the device.
        let function =
            unsafe { self.driver.function(module, kernel.name) }.map_err(|error| self.failed(error))?;
        loaded.functions.insert(kernel.name, function);
        Ok((function, start.elapsed()))
    }

    /// Compiles a module that this build has not for the device, which takes a while and is told.
    fn compile(&self, module: &str) -> Result<&'static [u8], DeviceError> {
        let (device, known) = (self.id(), self.driver.architectures());
        let architecture = self.facts.architecture.clone();
        match self.driver.compile(&architecture, module) {
            Ok(Compiled { image, compiler }) => {
                let why = format!(
                    "this build has none for {architecture}, but for {known}; {compiler} compiles them"
                );
                self.note("kernels are compiled on this machine", why);
                Ok(image)
            }
            Err(CompileError::NoCompiler(why)) => {
                Err(DeviceError::NoKernels { device, architecture, known, why })
            }
            Err(CompileError::Failed { what, log }) => {
                Err(DeviceError::NotCompiled { device, architecture, what, log })
            }
        }
    }

    /// Unloads every module, once nothing of them runs. The device is current.
    pub(super) fn unload(&self) {
        let loaded = std::mem::take(&mut *lock(&self.modules.loaded));
        if loaded.modules.is_empty() {
            return;
        }
        for stream in [self.copy, self.compute] {
            // SAFETY: both streams are this device's, and alive.
            if unsafe { self.driver.stream_wait(stream) }.is_err() {
                return; // A kernel may still run: its code is left to the context's end.
            }
        }
        for module in loaded.modules.into_values() {
            // SAFETY: the last handle of this device goes away, and nothing runs any more. A failure leaves the module to
            // the context's end.
            let _ = unsafe { self.driver.module_unload(module) };
        }
    }
}

/// Threads of a block: a multiple of every vendor's width, small enough that registers never limit it.
pub(super) const BLOCK_THREADS: u64 = 256;

/// Threads that one processor holds, both vendors' alike.
const PROCESSOR_THREADS: u64 = 2048;

/// Elements that a thread of the cast takes at a time.
const CAST_ELEMENTS: u64 = 8;

const VECTOR_LEN_BYTES: u64 = 16;
