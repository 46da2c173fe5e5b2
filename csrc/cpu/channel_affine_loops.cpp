// The loops of channel_affine for one instruction set: this file is compiled once for each, with
// UEO_FAST_LEVEL set to base, avx2 or avx512 (CMakeLists.txt).
//
// Everything but the last functions has internal linkage: see half.h.
#include "channel_affine.h"
#include "channel_affine_tiles.h"

namespace ueo_fast::cpu {
namespace {

template <class F>
inline void for_each_tile(int64_t begin, int64_t end, F&& f) {
  for (; begin < end; begin += kAffineTile) {
    const int64_t left = end - begin;
    f(begin, left < kAffineTile ? left : kAffineTile);
  }
}

// Cuts the tile [begin, begin + n) where a channel's run ends; calls f(run, first, count).
template <class F>
inline void for_each_run(int64_t begin, int64_t n, int64_t period, F&& f) {
  int64_t run = begin / period;
  int64_t end = (run + 1) * period - begin;  // of the run, within the tile
  for (int64_t first = 0; first < n; first = end, end += period, ++run) {
    f(run, first, (end < n ? end : n) - first);
  }
}

// Calls f(begin, n, column) for each row of the block, a tile in the order of memory.
template <class F>
inline void for_each_row(const Block& block, int64_t elements, int64_t period, F&& f) {
  for (int64_t row = block.row; row < block.row_end; ++row) {
    const int64_t begin = row * period + block.column;
    const int64_t left = elements - begin;  // the last row may end before the block does
    const int64_t n = block.column_end - block.column;
    if (left > 0) f(begin, left < n ? left : n, block.column);
  }
}

template <class A, class S>
void forward_runs(const AffineForward<A>& args, int64_t begin, int64_t end) {
  const Parameters<A>& p = args.parameters;
  for_each_tile(begin, end, [&](int64_t first, int64_t n) {
    forward_tile<A, S>(args, first, n, [&](auto&& span) {
      for_each_run(first, n, p.period, [&](int64_t run, int64_t at, int64_t count) {
        const int64_t c = run % p.channels;
        span(at, count, Constant<A>{p.scale[c]}, Constant<A>{p.shift[c]});
      });
    });
  });
  if (args.stream) stream_fence();
}

template <class A, class S>
void forward_columns(const AffineForward<A>& args, const Block& block) {
  const Parameters<A>& p = args.parameters;
  for_each_row(block, args.elements, p.period, [&](int64_t begin, int64_t n, int64_t column) {
    forward_tile<A, S>(args, begin, n, [&](auto&& span) {
      span(0, n, Spread<A>{p.scale + column}, Spread<A>{p.shift + column});
    });
  });
  if (args.stream) stream_fence();
}

template <class A, class S>
void backward_runs(const AffineBackward<A>& args, int64_t begin, int64_t end, A* sums) {
  const Parameters<A>& p = args.parameters;
  const bool relu = args.relu && !args.bits;
  const int64_t first_run = begin / p.period;
  if (sums) {
    const int64_t runs = (end - 1) / p.period + 1 - first_run;
    for (int64_t j = 0; j < 2 * runs; ++j) sums[j] = 0;
  }
  for_each_tile(begin, end, [&](int64_t first, int64_t n) {
    backward_tile<A, S>(args, first, n, [&](const A* g, const A* x, A* grad_x) {
      for_each_run(first, n, p.period, [&](int64_t run, int64_t at, int64_t count) {
        const int64_t c = run % p.channels;
        backward_span<A>(relu, g + at, x ? x + at : nullptr, Constant<A>{p.scale[c]},
                         Constant<A>{p.shift[c]}, Constant<A>{p.mean[c]}, count,
                         grad_x ? grad_x + at : nullptr, sums != nullptr,
                         sums ? sums + 2 * (run - first_run) : nullptr);
      });
    });
  });
  if (args.stream) stream_fence();
}

template <class A, class S>
void backward_columns(const AffineBackward<A>& args, const Block& block, A* sums) {
  const Parameters<A>& p = args.parameters;
  const bool relu = args.relu && !args.bits;
  if (sums) {
    for (int64_t j = block.column; j < block.column_end; ++j) sums[j] = sums[p.period + j] = 0;
  }
  for_each_row(block, args.elements, p.period, [&](int64_t begin, int64_t n, int64_t column) {
    backward_tile<A, S>(args, begin, n, [&](const A* g, const A* x, A* grad_x) {
      backward_span<A>(relu, g, x, Spread<A>{p.scale + column}, Spread<A>{p.shift + column},
                       Spread<A>{p.mean + column}, n, grad_x, sums != nullptr,
                       sums ? sums + column : nullptr, sums ? sums + p.period + column : nullptr);
    });
  });
  if (args.stream) stream_fence();
}

// The storage type is chosen per unit of work, far outside the loops.
template <class F>
inline void with_storage(Storage storage, F&& f) {
  if (storage == Storage::kHalf) return f(Half{});
  if (storage == Storage::kBFloat16) return f(BFloat16{});
  f(float{});
}

void forward_runs_any(const AffineForward<float>& args, int64_t begin, int64_t end) {
  with_storage(args.storage, [&](auto s) { forward_runs<float, decltype(s)>(args, begin, end); });
}

void forward_columns_any(const AffineForward<float>& args, const Block& block) {
  with_storage(args.storage, [&](auto s) { forward_columns<float, decltype(s)>(args, block); });
}

void backward_runs_any(const AffineBackward<float>& args, int64_t begin, int64_t end,
                       float* sums) {
  with_storage(args.storage,
               [&](auto s) { backward_runs<float, decltype(s)>(args, begin, end, sums); });
}

void backward_columns_any(const AffineBackward<float>& args, const Block& block, float* sums) {
  with_storage(args.storage,
               [&](auto s) { backward_columns<float, decltype(s)>(args, block, sums); });
}

constexpr AffineLoops<float> kFloatLoops = {forward_runs_any, forward_columns_any,
                                            backward_runs_any, backward_columns_any};
constexpr AffineLoops<double> kDoubleLoops = {forward_runs<double, double>,
                                              forward_columns<double, double>,
                                              backward_runs<double, double>,
                                              backward_columns<double, double>};

}  // namespace

#define UEO_FAST_CONCATENATE(a, b) a##b
#define UEO_FAST_NAME(base, level) UEO_FAST_CONCATENATE(base, level)

const AffineLoops<float>& UEO_FAST_NAME(float_affine_, UEO_FAST_LEVEL)() { return kFloatLoops; }
const AffineLoops<double>& UEO_FAST_NAME(double_affine_, UEO_FAST_LEVEL)() { return kDoubleLoops; }

}  // namespace ueo_fast::cpu
