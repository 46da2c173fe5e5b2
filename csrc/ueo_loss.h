// The loss's options and what it keeps for backward, the same on every device. No torch header. Steps
// are those of docs/math.md.
#pragma once

#include <cstdint>

#include "storage.h"

namespace ueo_fast {

// Options shared by all rows.
struct UeoOptions {
  double trade_off = 1.0;         // lambda
  double confidence_scale = 1.0;  // multiplies the logits before the internal confidence
  double eps = 0.0;               // added inside every logarithm
};

// (rows, columns) logits; the elements of a row are adjacent, rows are row_stride elements apart.
struct LogitsView {
  const void* data;
  Storage storage;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

// One row of what forward keeps for backward; kRowStats numbers of the compute type.
enum RowStat : int64_t {
  kRowMax,      // max_c z_ic
  kRowSum,      // sum_c exp(z_ic - max)
  kRowMeanLog,  // mean under p of log2(exp(z - max)); with eps, of log(p + eps) + p / (p + eps);
                // 0 on a CPU, where backward does not use it
  kRowConfidence,      // w_i, up to the scale of a given w
  kRowMarginalWeight,  // v_i, up to a scale
  kRowStats
};

// Sums over the batch; kSummary numbers of the compute type.
enum Summary : int64_t {
  kConditionalEntropy,  // sum_i a_i H_i
  kMarginalEntropy,     // H(q)
  kMeanConfidence,      // sum_i w_i / B
  kConfidenceSum,       // sum_i of kRowConfidence
  kMarginalWeightSum,   // sum_i of kRowMarginalWeight
  kSummary
};

// What forward keeps for backward, in one buffer of the compute type and without gaps. The row
// statistics come first, so that they start at the allocator's alignment, at a whole slot.
template <class A>
struct Saved {
  A* row_stats;  // (rows, kRowStats)
  A* marginal;   // (columns,)
  A* summary;    // (kSummary,)

  static int64_t size(int64_t rows, int64_t columns) {
    return rows * kRowStats + columns + kSummary;
  }
  Saved(A* buffer, int64_t rows, int64_t columns)
      : row_stats(buffer), marginal(row_stats + rows * kRowStats), summary(marginal + columns) {}
};

}  // namespace ueo_fast
