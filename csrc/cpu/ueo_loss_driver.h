// The loss on whole batches: blocks of rows, column sums, threads. No torch header.
#pragma once

#include <cstdint>

#include "threads.h"
#include "ueo_loss.h"

namespace ueo_fast::cpu {

// Steps 1 to 7. Writes row_stats (rows, kRowStats), summary (kSummary,) and marginal (columns,);
// returns the loss. The result does not depend on how parallel_for splits its range. Throws
// std::invalid_argument, before anything is written, where a confidence is not positive and finite,
// or a marginal weight negative or not finite, or all of them are 0.
template <class A>
double ueo_forward(const UeoLoops<A>& loops, ForwardRows<A> args, A* summary, A* marginal,
                   const ParallelFor& parallel_for);

// Step 8, from what forward wrote. args.log_marginal is computed here from `marginal`.
template <class A>
void ueo_backward(const UeoLoops<A>& loops, BackwardRows<A> args, const A* marginal,
                  const ParallelFor& parallel_for);

// Step 2 for the whole batch; out (rows,).
template <class A>
void max_softmax(const UeoLoops<A>& loops, const LogitsView& logits, double scale, A* out,
                 const ParallelFor& parallel_for);

}  // namespace ueo_fast::cpu
