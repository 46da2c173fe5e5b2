// Steps 1 to 6 of docs/math.md: loops over blocks of rows, then over the marginal's columns.
//
// Internal linkage throughout: see half.h.
#pragma once

#include "rows.h"
#include "simd_math.h"
#include "tuning.h"
#include "ueo_loss.h"

namespace ueo_fast::cpu {
namespace {

using tuning::kRowGroup;

// e = exp(x - max); adds up e and e * log2(e).
template <class A>
inline void exp_tile(const Columns<const A*>& x, A max, const Ahead& ahead, A* __restrict e,
                     double& sum, double& dot) {
  const A zero = zero_exponent<A>();
  LaneSums<A> sums;
  LaneSums<A> dots;
  for_each_pad<A>(x, [&](const A* __restrict pad, int64_t j) {
    ahead.prefetch(j);
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      const A t = clamped_exponent(pad[l] - max, FloatTraits<A>::kLog2e, zero);
      const A value = exp2_clamped(t);
      e[j + l] = value;
      sums.lane[l] += value;
      dots.lane[l] += value * t;
    }
  });
  sum += sums.total();
  dot += dots.total();
}

// sum of exp(scale * (x - max)).
template <class A>
inline double scaled_exp_sum_tile(const Columns<const A*>& x, A max, double scale) {
  const A log2_scale = static_cast<A>(scale * FloatTraits<double>::kLog2e);
  const A zero = zero_exponent<A>();
  LaneSums<A> sums;
  for_each_pad<A>(x, [&](const A* __restrict pad, int64_t) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      sums.lane[l] += exp2_clamped(clamped_exponent(pad[l] - max, log2_scale, zero));
    }
  });
  return sums.total();
}

// With p = e * inverse_sum: sums of p log(p + eps) and of p^2 / (p + eps).
template <class A>
inline void entropy_eps_tile(const A* __restrict e, A inverse_sum, A eps, int64_t n, double& plogp,
                             double& ratio) {
  assume_padded(n);
  LaneSums<A> plogps;
  LaneSums<A> ratios;
  for (int64_t j = 0; j < n; j += kPad) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      const A p = e[j + l] * inverse_sum;
      plogps.lane[l] += p * log_nonnegative(p + eps);
      ratios.lane[l] += p * (p / (p + eps));
    }
  }
  plogp += plogps.total();
  ratio += ratios.total();
}

// sums (+)= sum_r weight_r * e_r over a group of rows.
template <class A, bool kFirst>
inline void add_rows(const A* __restrict e, const A* weight, int64_t row_size,
                     A* __restrict sums) {
  const A* __restrict e0 = e;
  const A* __restrict e1 = e + row_size;
  const A* __restrict e2 = e + 2 * row_size;
  const A* __restrict e3 = e + 3 * row_size;
  const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  static_assert(kRowGroup == 4);
  assume_padded(row_size);
#pragma omp simd
  for (int64_t j = 0; j < row_size; ++j) {
    const A sum = w0 * e0[j] + w1 * e1[j] + w2 * e2[j] + w3 * e3[j];
    sums[j] = kFirst ? sum : sums[j] + sum;
  }
}

// Steps 1, 2 and 4 of one row: e = exp(z - max) (padded with zeros), and its statistics.
template <class A, class S>
inline void forward_row(const ForwardRows<A>& args, int64_t row, A* e, A* buffer, BlockSums& sums,
                        A& column_weight) {
  RowReader<A, S> z(args.logits, row, buffer);
  const UeoOptions& options = args.options;
  const A max = row_max(z);
  double sum = 0;
  double dot = 0;
  for_each_tile(z.columns, [&](const Tile& tile) {
    exp_tile(z.read(tile), max, z.ahead(tile), e + tile.begin, sum, dot);
  });
  const double inverse_sum = 1 / sum;

  double confidence = inverse_sum;
  double marginal_weight = sum;  // 1 / confidence
  if (args.confidence) {
    confidence = args.confidence[row] / args.largest_confidence;
    marginal_weight = args.smallest_confidence / args.confidence[row];
  } else if (options.confidence_scale != 1) {
    marginal_weight = 0;
    for_each_tile(z.columns, [&](const Tile& tile) {
      marginal_weight += scaled_exp_sum_tile(z.read(tile), max, options.confidence_scale);
    });
    confidence = 1 / marginal_weight;
  }
  if (args.marginal_weights) {
    marginal_weight = args.marginal_weights[row] / args.largest_marginal_weight;
  }

  double mean_log = dot * inverse_sum;
  double plogp = kLn2 * mean_log - log_nonnegative(sum);
  if (options.eps != 0) {
    plogp = 0;
    double ratio = 0;
    for_each_tile(z.columns, [&](const Tile& tile) {
      entropy_eps_tile(e + tile.begin, static_cast<A>(inverse_sum), static_cast<A>(options.eps),
                       tile.padded, plogp, ratio);
    });
    mean_log = plogp + ratio;
  }

  A* stats = args.row_stats + row * kRowStats;
  stats[kRowMax] = max;
  stats[kRowSum] = static_cast<A>(sum);
  stats[kRowMeanLog] = static_cast<A>(mean_log);
  stats[kRowConfidence] = static_cast<A>(confidence);
  stats[kRowMarginalWeight] = static_cast<A>(marginal_weight);
  sums.confidence += confidence;
  sums.marginal_weight += marginal_weight;
  sums.weighted_entropy -= confidence * plogp;
  column_weight = static_cast<A>(marginal_weight * inverse_sum);
}

template <class A, class S>
void forward_rows(const ForwardRows<A>& args, int64_t begin, int64_t end, BlockSums* sums,
                  A* column_sums, A* scratch) {
  const int64_t row_size = padded(args.logits.columns);
  A* buffer = scratch + kRowGroup * row_size;
  for (int64_t first = begin; first < end; first += kRowGroup) {
    A weight[kRowGroup] = {};
    for (int64_t r = 0; r < kRowGroup; ++r) {
      A* e = scratch + r * row_size;
      if (first + r < end) {
        forward_row<A, S>(args, first + r, e, buffer, *sums, weight[r]);
      } else {  // the last, incomplete group: what an earlier group left must not be added
        for (int64_t j = 0; j < row_size; ++j) e[j] = 0;
      }
    }
    if (first == begin) {
      add_rows<A, true>(scratch, weight, row_size, column_sums);
    } else {
      add_rows<A, false>(scratch, weight, row_size, column_sums);
    }
  }
}

template <class A>
void marginal(const A* __restrict column_sums, int64_t blocks, int64_t row_size, double scale,
              int64_t n, A* __restrict out) {
  assume_padded(n);
  double sums[tuning::kTileColumns] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const A* __restrict part = column_sums + block * row_size;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += part[j];
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<A>(sums[j] * scale);
}

template <class A>
double log_marginal(const A* __restrict q, double eps_option, int64_t n, A* __restrict log_q) {
  assume_padded(n);
  const A eps = static_cast<A>(eps_option);
  LaneSums<A> sums;
  for (int64_t j = 0; j < n; j += kPad) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      const A value = log_nonnegative(q[j + l] + eps);
      sums.lane[l] += q[j + l] * value;
      log_q[j + l] = value;
    }
  }
  if (eps != 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) log_q[j] += q[j] / (q[j] + eps);
  }
  return sums.total();
}

}  // namespace
}  // namespace ueo_fast::cpu
