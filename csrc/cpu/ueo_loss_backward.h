// Step 8 of docs/math.md: the gradient of blocks of rows, from what forward saved.
//
// Internal linkage throughout: see half.h.
#pragma once

#include "rows.h"
#include "simd_math.h"
#include "tuning.h"
#include "ueo_loss.h"

namespace ueo_fast::cpu {
namespace {

// e = exp(x - max); returns the sum of e * log_q.
template <class A>
inline double exp_dot_tile(const Columns<const A*>& x, const A* __restrict log_q, A max,
                           const Ahead& ahead, A* __restrict e) {
  const A zero = zero_exponent<A>();
  LaneSums<A> dots;
  for_each_pad<A>(x, [&](const A* __restrict pad, int64_t j) {
    ahead.prefetch(j);
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      const A t = clamped_exponent(pad[l] - max, FloatTraits<A>::kLog2e, zero);
      const A value = exp2_clamped(t);
      e[j + l] = value;
      dots.lane[l] += value * log_q[j + l];
    }
  });
  return dots.total();
}

// The constants of step 8 for one row: grad = e * (entropy * (log p - mean_log_p) +
// marginal * (log q - mean_log_q)). Differences first: on a confident row both vanish exactly,
// where products minus a constant would leave the rounding of the constant.
template <class A>
struct GradRow {
  A max;
  A inverse_sum;
  A eps;
  A entropy;
  A mean_log_p;  // kRowMeanLog; log p enters in the same unit
  A marginal;
  A mean_log_q;
};

// The gradient of kPad columns.
template <class A>
inline void grad_pad(const A* __restrict x, const A* __restrict e, const A* __restrict log_q,
                     const GradRow<A>& row, A zero, A* __restrict out) {
#pragma omp simd
  for (int64_t l = 0; l < kPad; ++l) {
    const A t = clamped_exponent(x[l] - row.max, FloatTraits<A>::kLog2e, zero);
    const A marginal = row.marginal * (log_q[l] - row.mean_log_q);
    out[l] = e[l] * (row.entropy * (t - row.mean_log_p) + marginal);
  }
}

template <class A>
inline void grad_eps_pad(const A* __restrict e, const A* __restrict log_q, const GradRow<A>& row,
                         A* __restrict out) {
#pragma omp simd
  for (int64_t l = 0; l < kPad; ++l) {
    const A p = e[l] * row.inverse_sum;
    const A log_p = log_nonnegative(p + row.eps) + p / (p + row.eps);
    const A marginal = row.marginal * (log_q[l] - row.mean_log_q);
    out[l] = e[l] * (row.entropy * (log_p - row.mean_log_p) + marginal);
  }
}

// The gradient of a tile of n padded columns; x and out may end in a tail each.
template <class A>
inline void grad_tile(const Columns<const A*>& x, const A* e, const A* log_q,
                      const GradRow<A>& row, int64_t n, const Columns<A*>& out) {
  const A zero = zero_exponent<A>();
  const auto step = [&](const A* pad, int64_t j, A* target) {
    if (row.eps == 0) {
      grad_pad(pad, e + j, log_q + j, row, zero, target);
    } else {
      grad_eps_pad(e + j, log_q + j, row, target);
    }
  };
  const int64_t whole = x.whole < out.whole ? x.whole : out.whole;
  for (int64_t j = 0; j < whole; j += kPad) step(x.whole_data + j, j, out.whole_data + j);
  if (whole < n) {
    step(whole < x.whole ? x.whole_data + whole : x.tail, whole,
         whole < out.whole ? out.whole_data + whole : out.tail);
  }
}

template <class A, class S>
inline void backward_row(const BackwardRows<A>& args, int64_t row, A* e, A* buffer) {
  RowReader<A, S> z(args.logits, row, buffer);
  const A* stats = args.row_stats + row * kRowStats;
  const A max = stats[kRowMax];
  double dot = 0;
  for_each_tile(z.columns, [&](const Tile& tile) {
    dot += exp_dot_tile(z.read(tile), args.log_marginal + tile.begin, max, z.ahead(tile),
                        e + tile.begin);
  });

  // Step 8 with p = e / sum: constants in double, and the upstream gradient folded into them
  // before anything is rounded.
  const double inverse_sum = 1 / static_cast<double>(stats[kRowSum]);
  const double scale = args.grad_loss * inverse_sum;
  const double a = stats[kRowConfidence] / args.confidence_sum;
  const double b = stats[kRowMarginalWeight] / args.marginal_weight_sum;
  const double log_unit = args.options.eps == 0 ? kLn2 : 1;
  const GradRow<A> grad_row{max,
                            static_cast<A>(inverse_sum),
                            static_cast<A>(args.options.eps),
                            static_cast<A>(-a * scale * log_unit),
                            stats[kRowMeanLog],
                            static_cast<A>(args.options.trade_off * b * scale),
                            static_cast<A>(dot * inverse_sum)};
  RowWriter<A, S> grad(args.grad, row, z.columns, args.stream);
  for_each_tile(z.columns, [&](const Tile& tile) {
    const Columns<A*> out = grad.target(tile, buffer + tuning::kTileColumns);
    grad_tile(z.read(tile), e + tile.begin, args.log_marginal + tile.begin, grad_row, tile.padded,
              out);
    grad.write(tile, out);
  });
}

template <class A, class S>
void backward_rows(const BackwardRows<A>& args, int64_t begin, int64_t end, A* scratch) {
  A* buffer = scratch + padded(args.logits.columns);
  for (int64_t row = begin; row < end; ++row) backward_row<A, S>(args, row, scratch, buffer);
  if (args.stream) stream_fence();
}

}  // namespace
}  // namespace ueo_fast::cpu
