// CUDA's names for a host compiler, on top of scheduler.h; what csrc/cuda/device.cuh takes from CUDA
// when nvcc compiles it. Static shared memory (__shared__) is left out on purpose: kernels ask for
// shared_memory(), which is poisoned before and guarded behind.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../../csrc/cpu/half.h"
#include "scheduler.h"

#define UEO_FAST_KERNEL void
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::cuda_host::position().thread)
#define blockIdx (::cuda_host::position().block)
#define blockDim (::cuda_host::position().block_size)
#define gridDim (::cuda_host::position().grid_size)

// Kernels read arrays of any type through it.
struct [[gnu::may_alias]] alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Correctly rounded, which CUDA's need not be.
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

inline void __syncthreads() { cuda_host::wait_for_block(); }
inline void __threadfence() { cuda_host::fence(); }

namespace cuda_host {

template <class T>
T shuffle(Meeting kind, unsigned mask, T value, unsigned source) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(kind, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_host

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_host::shuffle(cuda_host::Meeting::kShuffleXor, mask, value,
                            (threadIdx.x % 32) ^ static_cast<unsigned>(lanes));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_host::shuffle(cuda_host::Meeting::kShuffle, mask, value,
                            static_cast<unsigned>(lane) % 32);
}

// Relaxed, as CUDA's: a missing __threadfence() is a race that ThreadSanitizer sees.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  cuda_host::before_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

namespace ueo_fast::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline unsigned char* shared_memory() { return cuda_host::shared_memory(); }

// Deferred to the wait: without it a reader finds what was there before.
inline void copy_async(void* shared, const void* global) {
  cuda_host::queue_copy({shared, global});
}
inline void copies_wait() {
  for (cuda_host::Copy copy; cuda_host::next_copy(copy);) {
    *static_cast<uint4*>(copy.shared) = *static_cast<const uint4*>(copy.global);
  }
}

inline void load_slot_if(bool wanted, uint4& slot, const uint4* global) {
  if (!wanted) return;
  cuda_host::check(reinterpret_cast<uintptr_t>(global) % 16 == 0,
                   "a load of 16 bytes is not aligned to them");
  slot = *global;
}

inline void store_streaming(uint4* global, uint4 value) {
  cuda_host::check(reinterpret_cast<uintptr_t>(global) % 16 == 0,
                   "a streaming store is not aligned to 16 bytes");
  *global = value;
}

inline float float_of_bits(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(Half x) { return to_float(::Half{x.bits}); }
inline float to_compute(BFloat16 x) { return to_float(::BFloat16{x.bits}); }

template <class T>
float low(unsigned pair) {
  return to_compute(T{static_cast<uint16_t>(pair)});
}
template <class T>
float high(unsigned pair) {
  return to_compute(T{static_cast<uint16_t>(pair >> 16)});
}

template <class T>
T to_storage(float x) {
  if constexpr (std::is_same_v<T, Half>) {
    ::Half out;
    from_float(x, out);
    return {out.bits};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    ::BFloat16 out;
    from_float(x, out);
    return {out.bits};
  } else {
    return x;
  }
}
template <class T>
T to_storage(double x) {
  return static_cast<T>(x);
}

}  // namespace ueo_fast::cuda
