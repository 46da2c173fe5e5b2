// Threads that share a row: a power of two of lanes of a warp, or a whole block.
#pragma once

#include <cmath>

#include "device.cuh"
#include "launch.h"

namespace ueo_fast::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// The number, if one of the two is NaN.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

struct Sum {
  template <class A>
  static constexpr A kNothing = A(0);
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a + b;
  }
};

struct Larger {
  template <class A>
  static constexpr A kNothing = A(-INFINITY);
  template <class A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return larger(a, b);
  }
};

// Every lane of the warp must take part, also those whose team has no row.
struct LaneTeam {
  int rank;
  int size;

  // Each of n numbers over the team, in a fixed order; every thread gets the same bits.
  template <class Op, class A, int n>
  __device__ __forceinline__ void reduce(Op op, A (&x)[n]) {
    for (int offset = size / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = op(x[i], __shfl_xor_sync(kAllLanes, x[i], offset));
    }
  }
};

// The warps exchange their results in shared memory. Two consecutive reductions use different halves of
// the scratch, so one barrier each is enough: a thread rewrites a half only after the other half's
// barrier, which every thread reaches after reading the first.
struct BlockTeam {
  int rank;
  int size;
  double* scratch;  // kScratchBytes of shared memory
  int turn = 0;

  template <class Op, class A, int n>
  __device__ __forceinline__ void reduce(Op op, A (&x)[n]) {
    static_assert(n <= 4);
    LaneTeam warp{rank % 32, 32};
    warp.reduce(op, x);
    A* half = reinterpret_cast<A*>(scratch + turn * (32 * 4));
    turn ^= 1;
    if (warp.rank == 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) half[rank / 32 * n + i] = x[i];
    }
    __syncthreads();
    // A lane per warp's result: every warp adds them up for itself.
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = warp.rank < size / 32 ? half[warp.rank * n + i] : Op::template kNothing<A>;
    }
    warp.reduce(op, x);
  }
};

// A part of a warp whose size the compiler knows.
template <int kLanes>
struct Lanes {
  int rank;

  __device__ __forceinline__ explicit Lanes(int thread) : rank(thread % kLanes) {}

  template <class Op, class A, int n>
  __device__ __forceinline__ void reduce(Op op, A (&x)[n]) const {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = op(x[i], __shfl_xor_sync(kAllLanes, x[i], offset));
    }
  }
  // What the lane `source` of the team has.
  template <class A>
  __device__ __forceinline__ A from(int source, A x) const {
    const int first = static_cast<int>(threadIdx.x) % 32 / kLanes * kLanes;
    return __shfl_sync(kAllLanes, x, first + source);
  }
};

// All threads of the block, with the first bytes of its shared memory as scratch.
__device__ __forceinline__ BlockTeam this_block() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
          reinterpret_cast<double*>(shared_memory())};
}

// The team of a kernel's row: the block, or the thread's lanes.
template <bool kBlock>
__device__ __forceinline__ auto& team_of(BlockTeam& block, LaneTeam& lanes) {
  if constexpr (kBlock) {
    return block;
  } else {
    return lanes;
  }
}

}  // namespace ueo_fast::cuda
