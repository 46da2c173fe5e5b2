// The loss's arithmetic on one row: what a team does between its barriers. Steps are those of
// docs/math.md; t stands for log2(exp(z - max)).
#pragma once

#include <cmath>

#include "rows.cuh"
#include "team.cuh"
#include "ueo_loss.h"

namespace ueo_fast::cuda {

template <class A>
inline constexpr A kLog2e = A(1.4426950408889634073599246810018921);
template <class A>
inline constexpr A kLn2 = A(0.69314718055994530941723212145817657);
// Below it 2^t is 0; a masked class stops here, so that 0 times its t is 0 and not NaN.
template <class A>
inline constexpr A kLowestExponent = sizeof(A) == 8 ? A(-1100) : A(-160);
template <class A>
inline constexpr A kSmallestNormal = sizeof(A) == 8 ? A(2.2250738585072014e-308)
                                                    : A(1.17549435e-38f);

__device__ __forceinline__ float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // one instruction, 2 units in the last place; numbers below 2^-126 become 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// t of a logit; comparisons are written so that NaN stays NaN.
template <class A>
__device__ __forceinline__ A exponent(A z, A max) {
  const A t = (z - max) * kLog2e<A>;
  return t < kLowestExponent<A> ? kLowestExponent<A> : t;
}

// Step 1 and the sums of steps 2 and 4 in a single sweep: whenever a larger logit appears, the sums
// so far are rescaled to it.
template <class A>
struct OnlineSoftmax {
  A max = -INFINITY;
  A sum = 0;         // of 2^t
  A log_sum = 0;     // of 2^t t
  A scaled_sum = 0;  // of 2^(scale t), if scale is not 1

  __device__ __forceinline__ void raise(A larger_max, A scale) {
    const A by = (max - larger_max) * kLog2e<A>;  // -inf at first: the sums are still 0
    const A clamped = by < kLowestExponent<A> ? kLowestExponent<A> : by;
    const A factor = exp2_of(clamped);
    log_sum = factor * (log_sum + sum * clamped);
    sum *= factor;
    if (scale != 1) scaled_sum *= exp2_of(scale * by);
    max = larger_max;
  }

  template <class T>
  __device__ __forceinline__ void add(const Slot<T>& slot, A scale) {
    A slot_max = to_compute(slot.x[0]);
#pragma unroll
    for (int k = 1; k < kPerSlot<T>; ++k) slot_max = larger(slot_max, to_compute(slot.x[k]));
    if (slot_max > max) raise(slot_max, scale);
    const A reference = max == -INFINITY ? A(0) : max;  // nothing but masked classes so far
#pragma unroll
    for (int k = 0; k < kPerSlot<T>; ++k) {
      const A z = to_compute(slot.x[k]);
      const A t = exponent(z, reference);
      const A e = exp2_of(t);
      sum += e;
      log_sum += e * t;
      if (scale != 1) scaled_sum += exp2_of(scale * ((z - reference) * kLog2e<A>));
    }
  }

  // The same for all threads of the team together.
  template <class Team>
  __device__ __forceinline__ void merge(Team& team, A scale) {
    A top[1] = {max};
    team.reduce(Larger{}, top);
    if (top[0] > max) raise(top[0], scale);
    A sums[3] = {sum, log_sum, scaled_sum};
    team.reduce(Sum{}, sums);
    const A none = max == -INFINITY ? A(NAN) : A(0);  // a row without any class
    sum = sums[0] + none;
    log_sum = sums[1];
    scaled_sum = sums[2] + none;
  }
};

// One row's part of what forward keeps for backward (csrc/ueo_loss.h, RowStat).
template <class A>
struct RowStatistics {
  A max;
  A sum;
  A mean_log;
  A confidence;
  A marginal_weight;

  __device__ __forceinline__ void store(A* row_stats) const {
    row_stats[kRowMax] = max;
    row_stats[kRowSum] = sum;
    row_stats[kRowMeanLog] = mean_log;
    row_stats[kRowConfidence] = confidence;
    row_stats[kRowMarginalWeight] = marginal_weight;
  }
  __device__ __forceinline__ static RowStatistics load(const A* row_stats) {
    return {row_stats[kRowMax], row_stats[kRowSum], row_stats[kRowMeanLog],
            row_stats[kRowConfidence], row_stats[kRowMarginalWeight]};
  }
};

template <class A>
struct Weights {
  const A* confidence;        // (rows,) or null
  const A* marginal_weights;  // (rows,) or null
};

// A row's statistics before its weights are known, from its maximum and the sums of e and e t; NaN for
// one without any class.
template <class A>
__device__ __forceinline__ RowStatistics<A> without_weights(A max, A sum, A log_sum) {
  const A s = max == -INFINITY ? A(NAN) : sum;
  return {max, s, log_sum / s, 0, 0};
}

// Steps 2 and 3: the weights of a row, given ones or its own from sum_c 2^(scale t).
template <class A>
__device__ __forceinline__ void weigh(RowStatistics<A>& row_stats, A scaled_sum,
                                      const Weights<A>& weights, int64_t index,
                                      const WeightRange& range) {
  if (weights.confidence != nullptr) {
    const A w = weights.confidence[index];
    row_stats.confidence = w / static_cast<A>(range.largest_confidence);
    row_stats.marginal_weight = static_cast<A>(range.smallest_confidence) / w;
  } else {
    row_stats.marginal_weight = scaled_sum;
    row_stats.confidence = 1 / scaled_sum;
  }
  if (weights.marginal_weights != nullptr) {
    row_stats.marginal_weight =
        weights.marginal_weights[index] / static_cast<A>(range.largest_marginal_weight);
  }
}

// Steps 1 to 3 of a row that `source` holds; without eps also step 4.
template <class A, class Team, class Source, class T>
__device__ __forceinline__ RowStatistics<A> row_statistics(
    Team& team, const Source& source, const Row<T>& row, int64_t index, A scale,
    const Weights<A>& weights, const WeightRange& range) {
  OnlineSoftmax<A> softmax;
  source.for_each(team, row, [&](int, const Slot<T>& slot) { softmax.add(slot, scale); });
  softmax.merge(team, scale);
  RowStatistics<A> row_stats{softmax.max, softmax.sum, softmax.log_sum / softmax.sum, 0, 0};
  const A scaled_sum = scale == 1 ? softmax.sum : softmax.scaled_sum;
  weigh(row_stats, scaled_sum, weights, index, range);
  return row_stats;
}

// With eps: entropy (step 4) and the mean of log(p + eps) + p / (p + eps), which takes the place of
// log p in step 8, from one element.
template <class A>
struct EpsSums {
  A entropy = 0;
  A mean_log = 0;

  __device__ __forceinline__ void add(A p, A eps) {
    const A log_p = log_of(p + eps);
    entropy -= p * log_p;
    mean_log += p * (log_p + p / (p + eps));
  }
};

// Entropy of the row, step 4, from its statistics; eps = 0.
template <class A>
__device__ __forceinline__ A row_entropy(const RowStatistics<A>& row_stats) {
  return kLn2<A> * (log2_of(row_stats.sum) - row_stats.mean_log);
}

// Step 6: what step 8 subtracts S_i from, log2 q; with eps log(q + eps) + q / (q + eps).
template <class A>
__device__ __forceinline__ A log_marginal(A q, A eps) {
  if (eps != 0) return log_of(q + eps) + q / (q + eps);
  return log2_of(q < kSmallestNormal<A> ? kSmallestNormal<A> : q);
}

// Numbers of the batch that step 8 needs, multiplied by the upstream gradient.
template <class A>
struct GradientScale {
  A confidence;       // times w_i: upstream a_i, in the unit of the logarithms
  A marginal_weight;  // times v_i: upstream lambda b_i, likewise

  __device__ __forceinline__ GradientScale(A grad_loss, double trade_off, A eps, const A* summary) {
    const double unit = eps == 0 ? kLn2<double> : 1.0;
    confidence = static_cast<A>(grad_loss * unit / summary[kConfidenceSum]);
    marginal_weight = static_cast<A>(grad_loss * unit * trade_off / summary[kMarginalWeightSum]);
  }
};

// Step 8 of one element: both differences vanish exactly on a confident row.
template <class A>
struct GradientRow {
  A max;
  A inverse_sum;
  A mean_log;
  A entropy_factor;   // - upstream a_i
  A marginal_factor;  // upstream lambda b_i
  A mean_log_marginal = 0;  // S_i

  __device__ __forceinline__ GradientRow(const RowStatistics<A>& row_stats,
                                         const GradientScale<A>& scale)
      : max(row_stats.max),
        inverse_sum(1 / row_stats.sum),
        mean_log(row_stats.mean_log),
        entropy_factor(-scale.confidence * row_stats.confidence),
        marginal_factor(scale.marginal_weight * row_stats.marginal_weight) {}

  __device__ __forceinline__ A operator()(A z, A log_marginal, A eps) const {
    const A t = exponent(z, max);
    const A p = exp2_of(t) * inverse_sum;
    const A log_p = eps == 0 ? t : log_of(p + eps) + p / (p + eps);
    return p * (entropy_factor * (log_p - mean_log) +
                marginal_factor * (log_marginal - mean_log_marginal));
  }
};

}  // namespace ueo_fast::cuda
