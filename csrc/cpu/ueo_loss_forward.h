// Steps 1 to 6 of docs/math.md: loops over blocks of rows, then over the marginal's columns.
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

using tuning::kRowGroup;

// With d = max - x: e = exp(-d); adds up e and e * d.
template <class A>
inline void exp_tile(const Columns<const A*>& x, A max, const Ahead& ahead, A* __restrict e,
                     double& sum, double& dot) {
  const Vector<A> limit = zero_distance<A>();
  VectorSums<A> sums;
  VectorSums<A> dots;
  for_each_pad<A>(x, [&](const A* __restrict pad, int64_t j) {
    ahead.prefetch(j);
    for_each_vector<A>([&](int64_t l) {
      const Vector<A> d = at_most<A>(limit, max - load(pad + l));
      const Vector<A> value = exp_minus<A>(d);
      store<A>(value, e + j + l);
      sums.at(l) += value;
      dots.at(l) += value * d;
    });
  });
  sum += sums.total();
  dot += dots.total();
}

// sum of exp(scale * (x - max)).
template <class A>
inline double scaled_exp_sum_tile(const Columns<const A*>& x, A max, double scale) {
  const A log2_scale = static_cast<A>(scale * FloatTraits<double>::kLog2e);
  const Vector<A> limit = zero_exponent<A>();
  VectorSums<A> sums;
  for_each_pad<A>(x, [&](const A* __restrict pad, int64_t) {
    for_each_vector<A>([&](int64_t l) {
      sums.at(l) += exp2_minus(at_most<A>(limit, log2_scale * (max - load(pad + l))), A(1));
    });
  });
  return sums.total();
}

// With p = e * inverse_sum: sum of p log(p + eps).
template <class A>
inline double entropy_eps_tile(const A* __restrict e, A inverse_sum, A eps, int64_t n) {
  assume_padded(n);
  LaneSums<A> sums;
  for (int64_t j = 0; j < n; j += kPad) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) {
      const A p = e[j + l] * inverse_sum;
      sums.lane[l] += p * log_nonnegative(p + eps);
    }
  }
  return sums.total();
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

// What forward knows about a group of rows once their exponentials are added up.
template <class A>
struct RowGroup {
  A max[kRowGroup] = {};
  double sum[kRowGroup] = {1, 1, 1, 1};         // of e
  double dot[kRowGroup] = {};                   // of e (max - z)
  double scaled_sum[kRowGroup] = {1, 1, 1, 1};  // of exp(confidence_scale * (z - max))
  double log_sum[kRowGroup];
  A column_weight[kRowGroup] = {};
  static_assert(kRowGroup == 4);
};

// Steps 1 and 2 of row r of the group: e = exp(z - max), padded with zeros, and its sums.
template <class A, class S>
inline void softmax_row(const ForwardRows<A>& args, int64_t row, int64_t r, A* e, A* buffer,
                        RowGroup<A>& group) {
  RowReader<A, S> z(args.logits, row, buffer);
  const A max = row_max(z);
  double sum = 0;
  double dot = 0;
  for_each_tile(z.columns, [&](const Tile& tile) {
    exp_tile(z.read(tile), max, z.ahead(tile), e + tile.begin, sum, dot);
  });
  group.max[r] = max;
  group.sum[r] = sum;
  group.dot[r] = dot;
  group.scaled_sum[r] = sum;
  const double scale = args.options.confidence_scale;
  if (scale == 1 || args.confidence) return;
  double scaled_sum = 0;
  for_each_tile(z.columns, [&](const Tile& tile) {
    scaled_sum += scaled_exp_sum_tile(z.read(tile), max, scale);
  });
  group.scaled_sum[r] = scaled_sum;
}

// Steps 2 and 4 of row r of the group: its statistics.
template <class A>
inline void row_statistics(const ForwardRows<A>& args, int64_t row, int64_t r, const A* e,
                           RowGroup<A>& group, BlockSums& sums) {
  const double inverse_sum = 1 / group.sum[r];
  double confidence = 1 / group.scaled_sum[r];
  double marginal_weight = group.scaled_sum[r];
  if (args.confidence) {
    confidence = args.confidence[row] / args.largest_confidence;
    marginal_weight = args.smallest_confidence / args.confidence[row];
  }
  if (args.marginal_weights) {
    marginal_weight = args.marginal_weights[row] / args.largest_marginal_weight;
  }

  double plogp = -group.dot[r] * inverse_sum - group.log_sum[r];
  if (args.options.eps != 0) {
    plogp = 0;
    for_each_tile(args.logits.columns, [&](const Tile& tile) {
      plogp += entropy_eps_tile(e + tile.begin, static_cast<A>(inverse_sum),
                                static_cast<A>(args.options.eps), tile.padded);
    });
  }

  A* stats = args.row_stats + row * kRowStats;
  stats[kRowMax] = group.max[r];
  stats[kRowSum] = static_cast<A>(group.sum[r]);
  stats[kRowMeanLog] = 0;
  stats[kRowConfidence] = static_cast<A>(confidence);
  stats[kRowMarginalWeight] = static_cast<A>(marginal_weight);
  sums.confidence += confidence;
  sums.marginal_weight += marginal_weight;
  sums.weighted_entropy -= confidence * plogp;
  group.column_weight[r] = static_cast<A>(marginal_weight * inverse_sum);
}

template <class A, class S>
void forward_rows(const ForwardRows<A>& args, int64_t begin, int64_t end, BlockSums* sums,
                  A* column_sums, A* scratch) {
  const int64_t row_size = padded(args.logits.columns);
  A* buffer = scratch + kRowGroup * row_size;
  for (int64_t first = begin; first < end; first += kRowGroup) {
    RowGroup<A> group;
    const int64_t rows = end - first < kRowGroup ? end - first : kRowGroup;
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row<A, S>(args, first + r, r, scratch + r * row_size, buffer, group);
    }
    // The last, incomplete group: values left by an earlier one must not be added, not even times 0.
    for (int64_t j = rows * row_size; j < kRowGroup * row_size; ++j) scratch[j] = 0;
#pragma omp simd
    for (int64_t r = 0; r < kRowGroup; ++r) group.log_sum[r] = log_nonnegative(group.sum[r]);
    for (int64_t r = 0; r < rows; ++r) {
      row_statistics(args, first + r, r, scratch + r * row_size, group, *sums);
    }
    if (first == begin) {
      add_rows<A, true>(scratch, group.column_weight, row_size, column_sums);
    } else {
      add_rows<A, false>(scratch, group.column_weight, row_size, column_sums);
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
