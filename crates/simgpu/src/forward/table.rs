//! The functions of a CUDA driver that HIP's calls are forwarded to.
//!
//! # Source
//! CUDA Driver API reference, version 12.0, as the CUDA backend's own table.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::calls::MemAccess;
use crate::cuda::Memcpy2d;
use crate::stream::HostFunction;

pub(super) type Handle = *mut c_void;
pub(super) type Address = u64;

tensorhaul_device::driver_table! {
    /// A CUDA driver.
    pub(super) struct Table {
        fn cuInit(c_uint);
        fn cuDeviceGetCount(*mut c_int);
        fn cuDeviceGet(*mut c_int, c_int);
        fn cuDeviceGetName(*mut c_char, c_int, c_int);
        fn cuDeviceGetAttribute(*mut c_int, c_int, c_int);
        fn cuDeviceGetPCIBusId(*mut c_char, c_int, c_int);
        fn cuDeviceTotalMem_v2(*mut usize, c_int);
        fn cuDevicePrimaryCtxRetain(*mut Handle, c_int);
        fn cuCtxSetCurrent(Handle);
        fn cuMemGetInfo_v2(*mut usize, *mut usize);
        fn cuStreamCreate(*mut Handle, c_uint);
        fn cuStreamDestroy_v2(Handle);
        fn cuStreamSynchronize(Handle);
        fn cuStreamWaitEvent(Handle, Handle, c_uint);
        fn cuEventCreate(*mut Handle, c_uint);
        fn cuEventDestroy_v2(Handle);
        fn cuEventRecord(Handle, Handle);
        fn cuEventQuery(Handle);
        fn cuEventSynchronize(Handle);
        fn cuMemAlloc_v2(*mut Address, usize);
        fn cuMemFree_v2(Address);
        fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        fn cuMemFreeHost(*mut c_void);
        fn cuMemHostRegister_v2(*mut c_void, usize, c_uint);
        fn cuMemHostUnregister(*mut c_void);
        fn cuMemHostGetDevicePointer_v2(*mut Address, *mut c_void, c_uint);
        fn cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Handle);
        fn cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, Handle);
        fn cuMemcpyDtoDAsync_v2(Address, Address, usize, Handle);
        fn cuMemcpy2DAsync_v2(*const Memcpy2d, Handle);
        fn cuMemcpyPeerAsync(Address, Handle, Address, Handle, usize, Handle);
        fn cuDeviceCanAccessPeer(*mut c_int, c_int, c_int);
        fn cuCtxEnablePeerAccess(Handle, c_uint);
        fn cuCtxDisablePeerAccess(Handle);
        fn cuLaunchHostFunc(Handle, HostFunction, *mut c_void);
        fn cuModuleLoadData(*mut Handle, *const c_void);
        fn cuModuleUnload(Handle);
        fn cuModuleGetFunction(*mut Handle, Handle, *const c_char);
        fn cuLaunchKernel(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void,
        );
        optional:
        fn cuThreadExchangeStreamCaptureMode(*mut c_int);
        fn cuDeviceGetMemPool(*mut Handle, c_int);
        fn cuMemPoolSetAccess(Handle, *const MemAccess, usize);
        fn cuMemAllocAsync(*mut Address, usize, Handle);
        fn cuMemFreeAsync(Address, Handle);
        fn cuMemcpyBatchAsync(
            *mut Address, *mut Address, *mut usize, usize, *mut c_uint, *mut usize, usize, *mut usize, Handle,
        );
    }
}
