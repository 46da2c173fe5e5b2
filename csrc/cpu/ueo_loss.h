// The loops of the loss on raw memory: no torch header, so that tests and benchmarks can run them
// at a forced instruction set (tests/cpp). Steps are those of docs/math.md.
#pragma once

#include <cstdint>

#include "../ueo_loss.h"
#include "capability.h"

namespace ueo_fast::cpu {

// Partial sums of one block of rows.
struct BlockSums {
  double confidence = 0;
  double marginal_weight = 0;
  double weighted_entropy = 0;
};

// A is the compute type: double for double logits, float for all others.
template <class A>
struct ForwardRows {
  LogitsView logits;
  UeoOptions options;
  const A* confidence;        // (rows,) or null
  const A* marginal_weights;  // (rows,) or null
  A* row_stats;               // (rows, kRowStats)
  // The largest of the given weights, to scale them to at most 1 (which does not change the shares
  // of step 3), so that no sum of them overflows or vanishes. 1 if none are given.
  double largest_confidence = 1;
  double smallest_confidence = 1;
  double largest_marginal_weight = 1;
};

template <class A>
struct BackwardRows {
  LogitsView logits;
  UeoOptions options;
  double grad_loss;      // the upstream gradient
  const A* row_stats;    // (rows, kRowStats)
  const A* log_marginal;  // a padded row, step 6
  double confidence_sum;
  double marginal_weight_sum;
  void* grad;   // (rows, columns) contiguous, of the logits' storage type
  bool stream;  // store past the cache
};

template <class A>
struct UeoLoops {
  // Steps 1 to 5 for rows [begin, end): row statistics, block sums, and the block's column sums
  // sum_i v_i p_ic (a padded row), which are overwritten.
  void (*forward)(const ForwardRows<A>& args, int64_t begin, int64_t end, BlockSums* sums,
                  A* column_sums, A* scratch);
  // Step 5 for n columns, a multiple of kPad: q = scale * sum over blocks of their column sums,
  // added in double and in the order of the blocks.
  void (*marginal)(const A* column_sums, int64_t blocks, int64_t row_size, double scale, int64_t n,
                   A* marginal);
  // Step 6 for n columns, a multiple of kPad: writes log q (with eps,
  // log(q + eps) + q / (q + eps)) and returns sum_c q log(q + eps).
  double (*log_marginal)(const A* marginal, double eps, int64_t n, A* log_marginal);
  // Step 8 for rows [begin, end).
  void (*backward)(const BackwardRows<A>& args, int64_t begin, int64_t end, A* scratch);
  // Step 2 alone: max_c softmax(scale * z)_c for rows [begin, end).
  void (*max_softmax)(const LogitsView& logits, double scale, int64_t begin, int64_t end,
                      A* scratch, A* out);
};

// The loops for one instruction set; `capability` must be one that this machine can run.
template <class A>
const UeoLoops<A>& ueo_loops(Capability capability);

}  // namespace ueo_fast::cpu
