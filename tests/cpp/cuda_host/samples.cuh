// Kernels that show what the shim of this folder does: right ones, and, where `planted` names a
// mistake, wrong ones.
#pragma once

#include "device.cuh"

namespace ueo_fast::cuda::samples {

// The number of the mistake, 0 for none.
inline int planted = 0;
inline constexpr int kNoBlockBarrier = 1;
inline constexpr int kShuffleForBarrier = 2;
inline constexpr int kNoFence = 3;
inline constexpr int kNoBarrierAfterCopy = 4;
inline constexpr int kBlocksShareAnElement = 5;
inline constexpr int kNoSecondBarrier = 6;
inline constexpr int kNoFenceAfterMark = 7;

// sums[block] = sum of the block's numbers, through shared memory.
inline UEO_FAST_KERNEL block_sum(const float* x, float* sums) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (planted != kNoBlockBarrier) __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    if (planted != kNoSecondBarrier || half != 2) __syncthreads();
  }
  if (threadIdx.x == 0) sums[planted == kBlocksShareAnElement ? 0 : blockIdx.x] = shared[0];
}

// Each lane gets its right neighbour's number, through shared memory; a shuffle is not a barrier.
inline UEO_FAST_KERNEL rotate_warps(const float* x, float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned warp = threadIdx.x / 32 * 32;
  shared[threadIdx.x] = x[threadIdx.x];
  if (planted != kShuffleForBarrier) __syncthreads();
  __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  out[threadIdx.x] = shared[warp + (threadIdx.x + 1) % 32];
}

// The block that comes last sums what all of them left behind.
inline UEO_FAST_KERNEL sum_of_blocks(const float* x, float* partial, unsigned* finished,
                                     float* out) {
  auto* is_last = reinterpret_cast<unsigned*>(shared_memory());
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (planted != kNoFence) __threadfence();
    *is_last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (*is_last == 0) return;
  if (planted != kNoFenceAfterMark) __threadfence();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
  }
}

// Each thread copies 16 bytes and reads those of the next one.
inline UEO_FAST_KERNEL copy_and_rotate(const float* x, float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  copy_async(shared + 4 * threadIdx.x, x + 4 * threadIdx.x);
  copies_wait();
  if (planted != kNoBarrierAfterCopy) __syncthreads();
  const unsigned next = (threadIdx.x + 1) % blockDim.x;
  for (unsigned i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * next + i];
}

}  // namespace ueo_fast::cuda::samples
