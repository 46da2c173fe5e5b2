// Everything of CUDA that kernels use, by name. nvcc compiles CUDA's own; a host compiler takes them
// from tests/cpp/cuda_host, with a thread of control per CUDA thread. Kernels include nothing else of
// CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#define UEO_FAST_KERNEL __global__ void

namespace ueo_fast::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// The block's shared memory, 16-byte aligned; its size is part of the launch.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Starts to copy 16 bytes, both addresses aligned to 16, past the registers. The copy is visible to
// the thread that started it once the thread has waited for it, to others after a barrier that
// follows the wait.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}
// Waits for all of the thread's copies.
__device__ __forceinline__ void copies_wait() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// Keeps the slot's registers if not wanted (a branch would make the compiler load elsewhere and move),
// and bypasses the L1: the data is read once.
__device__ __forceinline__ void load_slot_if(bool wanted, uint4& slot, const uint4* global) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(slot.x), "+r"(slot.y), "+r"(slot.z), "+r"(slot.w)
      : "l"(global), "r"(static_cast<int>(wanted)));
}

__device__ __forceinline__ float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
// The two elements in a word of half ones.
template <class T>
__device__ __forceinline__ float low(unsigned pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(pair << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  }
}
template <class T>
__device__ __forceinline__ float high(unsigned pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(pair & 0xffff0000u);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
}

// A 16-byte store that will not be read again soon: first to leave the cache.
__device__ __forceinline__ void store_streaming(uint4* global, uint4 value) {
  __stcs(global, value);
}

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_compute(BFloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T to_storage(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}
template <class T>
__device__ __forceinline__ T to_storage(double x) {
  return x;
}

}  // namespace ueo_fast::cuda

#else

#include "host_device.h"

#endif
