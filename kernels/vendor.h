// What differs between vendors, and nothing else: the kernels themselves name none.
//
// One source is compiled three ways: by clang for NVIDIA (PTX), by clang for AMD (code objects), and by any C++17
// compiler for the host, where the simulated driver runs it. Memory is reached only through `load` and `store`, by
// addresses that are numbers: on devices they say that the memory is global, on the host they ask the simulator first.
//
// C++17 without a standard library: device builds have no headers.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/// Sixteen bytes that one instruction loads or stores, where the address is a multiple of 16.
typedef u64 Vector __attribute__((vector_size(16)));
constexpr u32 VECTOR_LEN = sizeof(Vector);

#if defined(__NVPTX__) || defined(__AMDGCN__)

#define DEVICE static __attribute__((device, always_inline)) inline

/// Defines a kernel; it takes one struct by value, which is `params` in its body.
#define KERNEL(name, Params) extern "C" __attribute__((global)) void name(const Params params)

/// Both vendors number global memory 1. Without it every access would first find out what memory it is of.
#define GLOBAL __attribute__((address_space(1)))

#if defined(__NVPTX__)
DEVICE u32 thread_index() {
  return __nvvm_read_ptx_sreg_ctaid_x() * __nvvm_read_ptx_sreg_ntid_x() + __nvvm_read_ptx_sreg_tid_x();
}
DEVICE u32 thread_count() { return __nvvm_read_ptx_sreg_nctaid_x() * __nvvm_read_ptx_sreg_ntid_x(); }
#else
DEVICE u32 thread_index() {
  return __builtin_amdgcn_workgroup_id_x() * __builtin_amdgcn_workgroup_size_x() + __builtin_amdgcn_workitem_id_x();
}
// AMD's grid is counted in threads.
DEVICE u32 thread_count() { return __builtin_amdgcn_grid_size_x(); }
#endif

/// Reads a value; the address is a multiple of its size.
template <class T> DEVICE T load(u64 address) { return *(const GLOBAL T *)address; }

/// Writes a value; the address is a multiple of its size.
template <class T> DEVICE void store(u64 address, T value) { *(GLOBAL T *)address = value; }

#else // The host.

#define DEVICE static inline

/// Asks whether memory may be touched so; the simulator notes what may not, and the access is left out.
extern "C" bool simgpu_touch(u64 address, u32 len, bool is_write);

/// The thread that runs now; the host runs them one after the other, so kernels with barriers cannot run here.
struct Thread {
  u32 index, count;
};
inline thread_local Thread current_thread;
DEVICE u32 thread_index() { return current_thread.index; }
DEVICE u32 thread_count() { return current_thread.count; }

template <class T> DEVICE T load(u64 address) {
  return simgpu_touch(address, sizeof(T), false) ? *reinterpret_cast<const T *>(address) : T{};
}

template <class T> DEVICE void store(u64 address, T value) {
  if (simgpu_touch(address, sizeof(T), true))
    *reinterpret_cast<T *>(address) = value;
}

/// Defines a kernel, and what the simulator calls: `name_host` runs every thread of a launch, `name_params_len` tells
/// the size of the struct.
#define KERNEL(name, Params)                                                                                           \
  static void name(const Params &params);                                                                              \
  extern "C" u32 name##_params_len() { return sizeof(Params); }                                                        \
  extern "C" void name##_host(u32 threads, const void *params) {                                                       \
    for (u32 index = 0; index < threads; ++index) {                                                                    \
      current_thread = {index, threads};                                                                               \
      name(*static_cast<const Params *>(params));                                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void name(const Params &params)

#endif

DEVICE float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE double double_of(u64 bits) { return __builtin_bit_cast(double, bits); }
DEVICE u32 bits_of(float value) { return __builtin_bit_cast(u32, value); }
DEVICE u64 bits_of(double value) { return __builtin_bit_cast(u64, value); }
