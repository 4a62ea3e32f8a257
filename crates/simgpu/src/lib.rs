//! Simulated GPU drivers: device memory is host memory, a stream is a thread with a queue.
//!
//! The library exports the functions of NVIDIA's driver that the CUDA backend looks up, and those of AMD's HIP runtime that
//! the ROCm backend does, its run-time compiler included, over one machine: its devices are every vendor's. The unmodified backends are pointed at it by
//! `TENSORHAUL_CUDA_LIBRARY` and `TENSORHAUL_HIP_LIBRARY` (communicators by `TENSORHAUL_NCCL_LIBRARY` and `TENSORHAUL_RCCL_LIBRARY`) and cannot tell the difference but by speed. What a
//! real driver would let pass, this one counts: copies outside an allocation, copies from memory that is not
//! pinned, kernels that touch what they must not, objects never freed. What a real driver does once a year, it does
//! on demand: any call fails at any use, memory runs out, a device is lost, work is late. Kernels are the host
//! builds of `kernels/`.
//!
//! With `forward=` HIP's calls run on a CUDA driver that is there, on real hardware; see [`forward`].
//!
//! `SIMGPU`, read at the first call, or [`simgpu_configure`], says what the machine is like; see [`config::Config`].

mod calls;
mod code_object;
mod config;
mod control;
mod core;
mod cuda;
mod cufile;
mod forward;
mod hip;
mod hiprtc;
mod kernels;
mod nccl;
mod ptx;
mod stream;
