// Step 8 of docs/math.md: the gradient of blocks of rows, from what forward saved.
//
// Internal linkage throughout: see half.h.
#pragma once

#include "lane_sums.h"
#include "rows.h"
#include "simd_math.h"
#include "tuning.h"
#include "ueo_loss.h"

namespace ueo_fast::cpu {
namespace {

// The constants of step 8 for one row, with 1 / s and the upstream gradient folded in.
template <class A>
struct GradRow {
  A max;
  A inverse_sum;
  A eps;
  A entropy;   // a_i
  A marginal;  // lambda b_i
};

// The gradient is e * (mean - slope): slope is -dL/dp, up to a constant that cancels in the
// difference, and mean is its mean under p. One difference for both terms together: on a confident
// row it vanishes exactly, while products minus a constant would leave the rounding of the constant.
//
// Computes e = exp(x - max) and the slopes; returns the sum of e * slope.
template <class A>
inline double slope_tile(const Columns<const A*>& x, const A* __restrict log_q,
                         const GradRow<A>& row, const Ahead& ahead, A* __restrict e,
                         A* __restrict slope) {
  const Vector<A> limit = zero_distance<A>();
  VectorSums<A> dots;
  for_each_pad<A>(x, [&](const A* __restrict pad, int64_t j) {
    ahead.prefetch(j);
    for_each_vector<A>([&](int64_t l) {
      const Vector<A> d = at_most<A>(limit, row.max - load(pad + l));
      const Vector<A> value = exp_minus<A>(d);
      const Vector<A> down = -(row.entropy * d) - row.marginal * load(log_q + j + l);
      store<A>(value, e + j + l);
      store<A>(down, slope + j + l);
      dots.at(l) += value * down;
    });
  });
  return dots.total();
}

// The same slopes with eps: log(p + eps) + p / (p + eps) instead of log p.
template <class A>
inline double slope_eps_tile(const A* __restrict e, const A* __restrict log_q,
                             const GradRow<A>& row, int64_t n, A* __restrict slope) {
  assume_padded(n);
  LaneSums<A> dots;
  for (int64_t j = 0; j < n; j += kPad) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      const A p = e[j + l] * row.inverse_sum;
      const A log_p = log_nonnegative(p + row.eps) + p / (p + row.eps);
      const A value = row.entropy * log_p - row.marginal * log_q[j + l];
      slope[j + l] = value;
      dots.lane[l] += e[j + l] * value;
    }
  }
  return dots.total();
}

template <class A>
inline void grad_pad(const A* e, const A* slope, A mean, A* out) {
  for_each_vector<A>([&](int64_t l) { store<A>(load(e + l) * (mean - load(slope + l)), out + l); });
}

// The gradient of a tile of n padded columns; out may end in a tail.
template <class A>
inline void grad_tile(const A* __restrict e, const A* __restrict slope, A mean, int64_t n,
                      const Columns<A*>& out) {
  A* __restrict whole = out.whole_data;
  for (int64_t j = 0; j < out.whole; j += kPad) grad_pad(e + j, slope + j, mean, whole + j);
  if (out.whole < n) grad_pad(e + out.whole, slope + out.whole, mean, out.tail);
}

template <class A, class S>
inline void backward_row(const BackwardRows<A>& args, int64_t row, A* e, A* slope, A* buffer) {
  RowReader<A, S> z(args.logits, row, buffer);
  const A* stats = args.row_stats + row * kRowStats;
  // Constants in double, and the upstream gradient folded into them before anything is rounded.
  const double inverse_sum = 1 / static_cast<double>(stats[kRowSum]);
  const double scale = args.grad_loss * inverse_sum;
  const double a = stats[kRowConfidence] / args.confidence_sum;
  const double b = stats[kRowMarginalWeight] / args.marginal_weight_sum;
  const GradRow<A> grad_row{stats[kRowMax], static_cast<A>(inverse_sum),
                            static_cast<A>(args.options.eps), static_cast<A>(a * scale),
                            static_cast<A>(args.options.trade_off * b * scale)};
  double dot = 0;
  for_each_tile(z.columns, [&](const Tile& tile) {
    const A* log_q = args.log_marginal + tile.begin;
    A* tile_e = e + tile.begin;
    A* tile_slope = slope + tile.begin;
    const double sum =
        slope_tile(z.read(tile), log_q, grad_row, z.ahead(tile), tile_e, tile_slope);
    dot += args.options.eps == 0
               ? sum
               : slope_eps_tile(tile_e, log_q, grad_row, tile.padded, tile_slope);
  });

  const A mean = static_cast<A>(dot * inverse_sum);
  RowWriter<A, S> grad(args.grad, row, z.columns, args.stream);
  for_each_tile(z.columns, [&](const Tile& tile) {
    const Columns<A*> out = grad.target(tile, buffer + tuning::kTileColumns);
    grad_tile(e + tile.begin, slope + tile.begin, mean, tile.padded, out);
    grad.write(tile, out);
  });
}

template <class A, class S>
void backward_rows(const BackwardRows<A>& args, int64_t begin, int64_t end, A* scratch) {
  A* slope = scratch + padded(args.logits.columns);
  A* buffer = slope + padded(args.logits.columns);
  for (int64_t row = begin; row < end; ++row) {
    backward_row<A, S>(args, row, scratch, slope, buffer);
  }
  if (args.stream) stream_fence();
}

}  // namespace
}  // namespace ueo_fast::cpu
