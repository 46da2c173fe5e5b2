// Registers as values, for loops whose instructions are counted: the vector extensions of GCC and
// Clang, in the width of the instruction set that the file is compiled for. Everything else is left
// to `omp simd`.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tuning.h"

namespace {

using ueo_fast::cpu::tuning::kPad;

#if defined(__AVX512F__)
inline constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
inline constexpr int64_t kRegisterBytes = 32;
#else
inline constexpr int64_t kRegisterBytes = 16;
#endif

template <class A>
struct VectorOf {
  using Integer = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  typedef A Type __attribute__((vector_size(kRegisterBytes)));
  typedef Integer Bits __attribute__((vector_size(kRegisterBytes)));
};

template <class A>
using Vector = typename VectorOf<A>::Type;

template <class A>
inline constexpr int64_t kLanes = kRegisterBytes / static_cast<int64_t>(sizeof(A));

template <class A>
inline Vector<A> load(const A* from) {
  Vector<A> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class A>
inline void store(Vector<A> value, A* to) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <class A>
inline Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// Calls step(j) at the kPad / kLanes registers of a pad, j the lane at which one begins.
template <class A, class F>
inline void for_each_vector(F&& step) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < kPad; j += kLanes<A>) step(j);
}

// kPad running sums: few enough to stay in registers, enough to hide an addition's latency.
template <class A>
struct VectorSums {
  Vector<A> part[kPad / kLanes<A>] = {};

  // Of the lanes that begin at j.
  Vector<A>& at(int64_t j) { return part[j / kLanes<A>]; }

  double total() const {
    Vector<A> all = part[0];
#pragma GCC unroll 8
    for (int64_t v = 1; v < kPad / kLanes<A>; ++v) all += part[v];
    A lane[kLanes<A>];
    store<A>(all, lane);
    for (int64_t n = kLanes<A> / 2; n > 1; n /= 2) {
      for (int64_t l = 0; l < n; ++l) lane[l] += lane[l + n];
    }
    return static_cast<double>(lane[0]) + static_cast<double>(lane[1]);
  }
};

}  // namespace
