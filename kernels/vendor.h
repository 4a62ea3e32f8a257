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
typedef signed char i8;
typedef int i32;

/// Sixteen bytes that one instruction loads or stores, where the address is a multiple of 16.
typedef u64 Vector __attribute__((vector_size(16)));
constexpr u32 VECTOR_LEN = sizeof(Vector);

/// Threads of a block, for kernels in which those of a block work together.
constexpr u32 BLOCK_THREADS = 256;

#if defined(__NVPTX__) || defined(__AMDGCN__)

#define DEVICE static __attribute__((device, always_inline)) inline

/// Defines a kernel; it takes one struct by value, which is `params` in its body.
#define KERNEL(name, Params) extern "C" __attribute__((global)) void name(const Params params)

/// Both vendors number global memory 1. Without it every access would first find out what memory it is of.
#define GLOBAL __attribute__((address_space(1)))

/// Defines a kernel whose blocks take the items of `params.item_count` in turn, each in some phases. All threads of a block
/// end a phase before one begins the next, and what a phase leaves in `shared` the next finds there. `item`, `thread` (of
/// the block) and `phase` are what the body is called for; a launch has blocks of BLOCK_THREADS.
#define KERNEL_PHASES(name, Params, Shared, phases)                                                                    \
  DEVICE void name##_phase(const Params &params, Shared &shared, u64 item, u32 thread, u32 phase);                     \
  extern "C" __attribute__((global, launch_bounds(BLOCK_THREADS))) void name(const Params params) {                    \
    static __attribute__((shared)) Shared shared;                                                                      \
    for (u64 item = block_index(); item < params.item_count; item += block_count()) {                                  \
      _Pragma("unroll") for (u32 phase = 0; phase < phases; ++phase) {                                                 \
        name##_phase(params, shared, item, thread_of_block(), phase);                                                  \
        barrier();                                                                                                     \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  DEVICE void name##_phase(const Params &params, Shared &shared, u64 item, u32 thread, u32 phase)

#if defined(__NVPTX__)
DEVICE u32 block_index() { return __nvvm_read_ptx_sreg_ctaid_x(); }
DEVICE u32 block_count() { return __nvvm_read_ptx_sreg_nctaid_x(); }
DEVICE u32 thread_of_block() { return __nvvm_read_ptx_sreg_tid_x(); }
DEVICE void barrier() { __syncthreads(); }
DEVICE u32 thread_index() {
  return __nvvm_read_ptx_sreg_ctaid_x() * __nvvm_read_ptx_sreg_ntid_x() + __nvvm_read_ptx_sreg_tid_x();
}
DEVICE u32 thread_count() { return __nvvm_read_ptx_sreg_nctaid_x() * __nvvm_read_ptx_sreg_ntid_x(); }
#else
DEVICE u32 block_index() { return __builtin_amdgcn_workgroup_id_x(); }
// AMD's grid is counted in threads.
DEVICE u32 block_count() { return __builtin_amdgcn_grid_size_x() / BLOCK_THREADS; }
DEVICE u32 thread_of_block() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE u32 thread_index() {
  return __builtin_amdgcn_workgroup_id_x() * __builtin_amdgcn_workgroup_size_x() + __builtin_amdgcn_workitem_id_x();
}
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

/// The thread that runs now; the host runs them one after the other, so that kernels with barriers are written in phases.
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

/// As above for a kernel whose blocks work together: every thread of a block runs a phase before one runs the next.
#define KERNEL_PHASES(name, Params, Shared, phases)                                                                    \
  static void name##_phase(const Params &params, Shared &shared, u64 item, u32 thread, u32 phase);                     \
  extern "C" u32 name##_params_len() { return sizeof(Params); }                                                        \
  extern "C" void name##_host(u32 threads, const void *bytes) {                                                        \
    const Params &params = *static_cast<const Params *>(bytes);                                                        \
    static thread_local Shared shared;                                                                                 \
    for (u64 block = 0; block < threads / BLOCK_THREADS; ++block)                                                      \
      for (u64 item = block; item < params.item_count; item += threads / BLOCK_THREADS)                                \
        for (u32 phase = 0; phase < phases; ++phase)                                                                   \
          for (u32 thread = 0; thread < BLOCK_THREADS; ++thread)                                                       \
            name##_phase(params, shared, item, thread, phase);                                                         \
  }                                                                                                                    \
  static void name##_phase(const Params &params, Shared &shared, u64 item, u32 thread, u32 phase)

#endif

DEVICE float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE double double_of(u64 bits) { return __builtin_bit_cast(double, bits); }
DEVICE u32 bits_of(float value) { return __builtin_bit_cast(u32, value); }
DEVICE u64 bits_of(double value) { return __builtin_bit_cast(u64, value); }
