// channel_affine on tiles: stretches of adjacent elements whose results fit a buffer. The caller's
// `cut` divides a tile into spans and calls span(first, n) for each.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <type_traits>

#include "channel_affine.h"
#include "channel_affine_spans.h"
#include "channel_mask.h"
#include "half.h"
#include "stream.h"

namespace ueo_fast::cpu {
namespace {

using tuning::kAffineFetch;

// Elements in the compute type: in place, or converted into `buffer`, so that the loops of the
// arithmetic exist once for all storage types.
template <class A, class S>
inline const A* loaded(const S* from, int64_t n, A* __restrict buffer) {
  if constexpr (std::is_same_v<A, S>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) buffer[j] = to_float(from[j]);
    return buffer;
  }
}

// Where a tile of results is computed: in place, or in a buffer where it is then rounded or stored
// past the cache.
template <class A, class S>
struct TileWriter {
  static constexpr bool kConverts = !std::is_same_v<A, S>;
  S* place;
  bool stream;
  alignas(64) A computed[kAffineTile];
  alignas(64) S rounded[kConverts ? kAffineTile : 1];

  TileWriter(void* base, int64_t begin, bool stream)
      : place(static_cast<S*>(base) + begin), stream(stream) {}

  A* to() {
    if constexpr (!kConverts) {
      if (!stream) return place;
    }
    return computed;
  }

  // Returns the results as stored, where they are still in the cache.
  const S* store(int64_t n) {
    const S* result = place;
    if constexpr (kConverts) {
      S* __restrict out = stream ? rounded : place;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) from_float(computed[j], out[j]);
      result = out;
    } else if (stream) {
      result = computed;
    }
    if (stream) stream_copy(place, result, n * static_cast<int64_t>(sizeof(S)));
    return result;
  }
};

// Prefetches what the loops need soon. Without it, the gradient's loads, which the compiler masks by
// what was computed from x, wait for x: half of the time of backward.
inline void fetch(const void* from, int64_t bytes) {
  const char* data = static_cast<const char*>(from);
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(data + b, 0, 3);
}

template <class A, class S, class Cut>
inline void forward_tile(const AffineForward<A>& args, int64_t begin, int64_t n, Cut&& cut) {
  alignas(64) A x_buffer[kAffineTile];
  alignas(64) A residual_buffer[kAffineTile];
  TileWriter<A, S> out(args.out, begin, args.stream);
  const A* x = loaded(static_cast<const S*>(args.x) + begin, n, x_buffer);
  const A* residual = nullptr;
  if (args.residual) {
    residual = loaded(static_cast<const S*>(args.residual) + begin, n, residual_buffer);
  }
  cut([&](int64_t first, int64_t count, auto scale, auto shift) {
    const A* from = x + first;
    A* to = out.to() + first;
    if (residual) {
      const A* added = residual + first;
      if (args.relu) return forward_span<A, true, true>(from, added, scale, shift, count, to);
      return forward_span<A, false, true>(from, added, scale, shift, count, to);
    }
    if (args.relu) return forward_span<A, true, false>(from, from, scale, shift, count, to);
    forward_span<A, false, false>(from, from, scale, shift, count, to);
  });
  const S* stored = out.store(n);
  if (args.bits) pack_mask(stored, n, args.bits + begin / 8);
}

// The gradient where the mask is one of bits, else grad_out; in grad_residual too, if wanted.
template <class S, class A>
inline const S* masked_by_bits(const AffineBackward<A>& args, int64_t begin, int64_t n,
                               S* buffer) {
  const S* g = static_cast<const S*>(args.grad_out) + begin;
  S* residual = args.grad_residual ? static_cast<S*>(args.grad_residual) + begin : nullptr;
  const int64_t bytes = n * static_cast<int64_t>(sizeof(S));
  if (args.bits) {
    S* to = residual && !args.stream ? residual : buffer;
    apply_mask(g, args.bits + begin / 8, n, to);
    if (residual && args.stream) stream_copy(residual, to, bytes);
    return to;
  }
  if (residual) __builtin_memcpy(residual, g, bytes);
  return g;
}

// Calls cut(g, x, grad_x), which cuts the tile into spans; x and grad_x may be null.
template <class A, class S, class Cut>
inline void backward_tile(const AffineBackward<A>& args, int64_t begin, int64_t n, Cut&& cut) {
  alignas(64) S masked_buffer[kAffineTile];
  alignas(64) A grad_buffer[kAffineTile];
  alignas(64) A x_buffer[kAffineTile];
  const S* grad_out = static_cast<const S*>(args.grad_out) + begin;
  const S* stored_x = args.x ? static_cast<const S*>(args.x) + begin : nullptr;
  fetch(grad_out + kAffineFetch, n * static_cast<int64_t>(sizeof(S)));
  if (stored_x) fetch(stored_x + kAffineFetch, n * static_cast<int64_t>(sizeof(S)));
  const S* masked = masked_by_bits<S>(args, begin, n, masked_buffer);
  const A* g = loaded(masked, n, grad_buffer);
  const A* x = stored_x ? loaded(stored_x, n, x_buffer) : nullptr;
  if (!args.grad_x) return cut(g, x, static_cast<A*>(nullptr));
  TileWriter<A, S> grad_x(args.grad_x, begin, args.stream);
  cut(g, x, grad_x.to());
  grad_x.store(n);
}

// One span: null pointers say what is not wanted. The variants without sums need no x unless the
// mask comes from it.
template <class A, class P, class... Sums>
inline void backward_span(bool relu, const A* grad_out, const A* x, P scale, P shift, P mean,
                          int64_t n, A* grad_x, bool needs_sums, Sums... sums) {
  if (!needs_sums) {
    if (!grad_x) return;
    if (relu) return grad_span<A, true>(grad_out, x, scale, shift, n, grad_x);
    return grad_span<A, false>(grad_out, grad_out, scale, shift, n, grad_x);
  }
  if (grad_x) {
    if (relu) {
      return sums_span<A, true, true>(grad_out, x, scale, shift, mean, n, grad_x, sums...);
    }
    return sums_span<A, false, true>(grad_out, x, scale, shift, mean, n, grad_x, sums...);
  }
  if (relu) {
    return sums_span<A, true, false>(grad_out, x, scale, shift, mean, n, grad_x, sums...);
  }
  sums_span<A, false, false>(grad_out, x, scale, shift, mean, n, grad_x, sums...);
}

}  // namespace
}  // namespace ueo_fast::cpu
