// The arithmetic of channel_affine on adjacent elements, whose parameters are those of one channel
// (Constant) or adjacent as well (Spread).
//
// Internal linkage throughout: see half.h.
#pragma once

#include "channel_affine.h"
#include "lane_sums.h"

namespace ueo_fast::cpu {
namespace {

template <class A>
struct Constant {
  A value;
  A operator[](int64_t) const { return value; }
};

template <class A>
struct Spread {
  const A* data;
  A operator[](int64_t j) const { return data[j]; }
};

// NaN stays NaN; what is not positive becomes +0.
template <class A>
inline A relu_of(A y) {
  return y <= 0 ? A(0) : y;
}

template <class A, bool kRelu, bool kResidual, class P>
inline void forward_span(const A* __restrict x, const A* __restrict residual, P scale, P shift,
                         int64_t n, A* __restrict out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    A y = x[j] * scale[j] + shift[j];
    if constexpr (kResidual) y += residual[j];
    out[j] = kRelu ? relu_of(y) : y;
  }
}

// The masked gradient: what forward_span let through, by the same arithmetic.
template <class A, bool kRelu, class P>
inline A masked(A g, A x, P scale, P shift, int64_t j) {
  if constexpr (!kRelu) return g;
  return x * scale[j] + shift[j] <= 0 ? A(0) : g;
}

template <class A, bool kRelu, class P>
inline void grad_span(const A* __restrict grad_out, const A* __restrict x, P scale, P shift,
                      int64_t n, A* __restrict grad_x) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    grad_x[j] = masked<A, kRelu>(grad_out[j], x[j], scale, shift, j) * scale[j];
  }
}

// One channel: sums[0] += sum g, sums[1] += sum g (x - mean).
template <class A, bool kRelu, bool kGrad>
inline void sums_span(const A* __restrict grad_out, const A* __restrict x, Constant<A> scale,
                      Constant<A> shift, Constant<A> mean, int64_t n, A* __restrict grad_x,
                      A* sums) {
  LaneSums<A> plain;
  LaneSums<A> times_x;
  const auto step = [&](int64_t j, int64_t l) {
    const A value = x[j + l];
    const A g = masked<A, kRelu>(grad_out[j + l], value, scale, shift, 0);
    plain.lane[l] += g;
    times_x.lane[l] += g * (value - mean.value);
    if constexpr (kGrad) grad_x[j + l] = g * scale.value;
  };
  const int64_t whole = n / kPad * kPad;
  for (int64_t j = 0; j < whole; j += kPad) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) step(j, l);
  }
  for (int64_t l = 0; l < n - whole; ++l) step(whole, l);
  sums[0] += static_cast<A>(plain.total());
  sums[1] += static_cast<A>(times_x.total());
}

// A channel per element: sums[j] += g, sums[offset + j] += g (x - mean).
template <class A, bool kRelu, bool kGrad>
inline void sums_span(const A* __restrict grad_out, const A* __restrict x, Spread<A> scale,
                      Spread<A> shift, Spread<A> mean, int64_t n, A* __restrict grad_x,
                      A* __restrict plain, A* __restrict times_x) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A value = x[j];
    const A g = masked<A, kRelu>(grad_out[j], value, scale, shift, j);
    plain[j] += g;
    times_x[j] += g * (value - mean[j]);
    if constexpr (kGrad) grad_x[j] = g * scale[j];
  }
}

}  // namespace
}  // namespace ueo_fast::cpu
