// The loss for any row: of doubles, of any length, anywhere in memory. A row is read twice from shared
// memory, or from the L2 where that has no room for it. Steps are those of docs/math.md.
#pragma once

#include "row_loop.cuh"
#include "ueo_loss_columns.cuh"
#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

template <class T>
struct StatisticsArguments {
  using A = ComputeType<T>;
  Matrix<T> logits;
  Weights<A> weights;
  A scale;               // of the internal confidence
  A eps;
  RowLoop loop;
  int ranges;            // that parts of the given weights have; 0: each block looks for itself
  WeightRange* range;    // of all, written by block 0; behind it, those of the parts
  A* column_sums;        // (blocks * teams, column numbers) if shared memory has no room, else null
  A* row_stats;          // (rows, kRowStats)
  A* partial_sums;       // (partials, column_stride): sum_i v_i p_ic of some rows
  int64_t column_stride;
  double* block_sums;    // (blocks, 3): sums of w, v, w H
  unsigned* finished;    // the marginal kernel's counter, set to 0
};

// The range of the given weights of rows first, first + hop, ...; by a whole block.
template <class A>
__device__ WeightRange scan_weights(BlockTeam& block, const Weights<A>& weights, int64_t first,
                                    int64_t rows, int64_t hop) {
  double most[3] = {0, -INFINITY, 0};  // the smallest confidence with its sign changed
  for (int64_t i = first + block.rank; i < rows; i += hop) {
    if (weights.confidence != nullptr) {
      const double w = weights.confidence[i];
      most[0] = larger(most[0], w);
      most[1] = larger(most[1], -w);
    }
    if (weights.marginal_weights != nullptr) {
      most[2] = larger(most[2], static_cast<double>(weights.marginal_weights[i]));
    }
  }
  block.reduce(Larger{}, most);
  return {most[0], -most[1], most[2]};
}

// The range of all given weights: from those of parts, or from the weights themselves.
template <class A>
__device__ WeightRange weight_range(BlockTeam& block, const Weights<A>& weights, int64_t rows,
                                    const WeightRange* parts, int count) {
  if (count == 0) return scan_weights(block, weights, 0, rows, block.size);
  double most[3] = {0, -INFINITY, 0};
  if (block.rank < count) {
    const WeightRange& part = parts[block.rank];
    most[0] = part.largest_confidence;
    most[1] = -part.smallest_confidence;
    most[2] = part.largest_marginal_weight;
  }
  block.reduce(Larger{}, most);
  return {most[0], -most[1], most[2]};
}

// The same as a kernel of rows asks for it; block 0 leaves it behind for the marginal.
template <class T>
__device__ __forceinline__ WeightRange given_range(BlockTeam& block,
                                                   const StatisticsArguments<T>& args) {
  if (args.weights.confidence == nullptr && args.weights.marginal_weights == nullptr) {
    return {1, 1, 1};
  }
  const WeightRange range =
      weight_range(block, args.weights, args.logits.rows, args.range + 1, args.ranges);
  if (blockIdx.x == 0 && block.rank == 0) *args.range = range;
  return range;
}

// The ranges of parts of many weights, a block for each.
template <class A>
UEO_FAST_KERNEL __launch_bounds__(tuning::kScanThreads)
    ueo_weight_range(Weights<A> weights, int64_t rows, WeightRange* parts) {
  BlockTeam block = this_block();
  const WeightRange found = scan_weights(block, weights, int64_t{blockIdx.x} * blockDim.x, rows,
                                         int64_t{gridDim.x} * blockDim.x);
  if (threadIdx.x == 0) parts[blockIdx.x] = found;
}

// First read of the logits: steps 1 to 4 of every row, step 5 up to the sum over blocks.
template <class T, bool kBlock>
UEO_FAST_KERNEL __launch_bounds__((kBlockThreads<T, kBlock>), (kResidentBlocks<T, kBlock>))
    ueo_statistics_any(StatisticsArguments<T> args) {
  using A = ComputeType<T>;
  const RowLoop& loop = args.loop;
  auto [block, lanes, team_index] = row_teams(loop);
  auto& team = team_of<kBlock>(block, lanes);

  unsigned char* memory = shared_memory() + kScratchBytes;
  const ColumnSlots<T> columns(loop.slots);
  A* shared_sums = reinterpret_cast<A*>(memory);
  A* global_sums = nullptr;
  if (args.column_sums != nullptr) {
    global_sums = args.column_sums + int64_t{blockIdx.x} * loop.teams * columns.size();
  } else {
    memory += sizeof(A) * columns.size() * loop.teams;
  }
  const int64_t own = team_index * columns.size();
  const auto clear_sums = [&] {
    with_sums(shared_sums, global_sums, [&](A* sums) { columns.clear(team, sums + own); });
  };
  const CachedRow<T> cache{reinterpret_cast<Slot<T>*>(memory) + team_index * loop.cached,
                           loop.cached};
  clear_sums();
  const Frame<T> frame = block_frame(args.logits);
  cache.fetch_all(team, row_or_nothing(args.logits, frame, loop.row(team_index, 0)));

  const WeightRange range = given_range(block, args);
  if (blockIdx.x == 0 && block.rank == 0) *args.finished = 0;

  double totals[3] = {0, 0, 0};
  for (int64_t step = 0; step < loop.steps; ++step) {
    const int64_t index = loop.row(team_index, step);
    const bool present = index < args.logits.rows;
    const Row<T> row = row_or_nothing(args.logits, frame, index);
    const Row<T> next = row_or_nothing(args.logits, frame, loop.row(team_index, step + 1));

    copies_wait();
    RowStatistics<A> row_stats = row_statistics<A>(team, cache, row, present ? index : 0, args.scale,
                                                   args.weights, range);
    const A inverse_sum = 1 / row_stats.sum;
    const A weight = row_stats.marginal_weight * inverse_sum;
    EpsSums<A> eps_sums;
    cache.for_each(team, row, [&](int slot, const Slot<T>& z) {
      // This slot has been read for the last time.
      if (next.frame.slots != 0) cache.fetch(next, slot);
      A e[kPerSlot<T>];
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        e[k] = exp2_of(exponent(to_compute(z.x[k]), row_stats.max));
        if (args.eps != 0) eps_sums.add(e[k] * inverse_sum, args.eps);
      }
      with_sums(shared_sums, global_sums,
                [&](A* sums) { columns.add(sums + own, slot, weight, e); });
    });
    A entropy;
    if (args.eps != 0) {
      A both[2] = {eps_sums.entropy, eps_sums.mean_log};
      team.reduce(Sum{}, both);
      entropy = both[0];
      row_stats.mean_log = both[1];
    } else {
      entropy = row_entropy(row_stats);
    }
    if (present && team.rank == 0) {
      row_stats.store(args.row_stats + index * kRowStats);
      totals[0] += row_stats.confidence;
      totals[1] += row_stats.marginal_weight;
      totals[2] += static_cast<double>(row_stats.confidence) * entropy;
    }
    const bool last = step + 1 == loop.steps;
    if (last || (step + 1) % tuning::kRowsPerSum == 0) {
      const int64_t partial = blockIdx.x + gridDim.x * (step / tuning::kRowsPerSum);
      __syncthreads();
      with_sums(shared_sums, global_sums, [&](const A* sums) {
        columns.store_partial_sum(block, frame, sums, loop.teams,
                                  args.partial_sums + partial * args.column_stride);
      });
      if (!last) {
        __syncthreads();
        clear_sums();
      }
    }
  }
  block.reduce(Sum{}, totals);
  if (block.rank == 0) {
    for (int i = 0; i < 3; ++i) args.block_sums[int64_t{blockIdx.x} * 3 + i] = totals[i];
  }
}

template <class T>
struct GradientArguments {
  using A = ComputeType<T>;
  Matrix<T> logits;
  const A* grad_loss;    // the upstream gradient, a number on the device; null for 1
  const A* summary;      // (kSummary,)
  const A* marginal;     // (columns,)
  const A* row_stats;    // (rows, kRowStats)
  double trade_off;
  A eps;
  RowLoop loop;
  bool columns_shared;   // whether log q fits into shared memory
  bool stream;           // store past the L2
  T* grad;               // (rows, columns) contiguous

  __device__ __forceinline__ GradientScale<A> gradient_scale() const {
    return {grad_loss == nullptr ? A(1) : *grad_loss, trade_off, eps, summary};
  }
};

// Second read and only write: step 8. Rows are visited in the opposite order of the statistics: what
// was read last is still in the L2.
template <class T, bool kBlock>
UEO_FAST_KERNEL __launch_bounds__((kBlockThreads<T, kBlock>), (kResidentBlocks<T, kBlock>))
    ueo_gradient_any(GradientArguments<T> args) {
  using A = ComputeType<T>;
  const RowLoop& loop = args.loop;
  auto [block, lanes, team_index] = row_teams(loop);
  auto& team = team_of<kBlock>(block, lanes);

  unsigned char* memory = shared_memory() + kScratchBytes;
  const ColumnSlots<T> columns(loop.slots);
  LogMarginal<T> log_q{nullptr, args.marginal, columns, args.eps};
  if (args.columns_shared) {
    log_q.shared = reinterpret_cast<A*>(memory);
    memory += sizeof(A) * columns.size();
  }
  const CachedRow<T> cache{reinterpret_cast<Slot<T>*>(memory) + team_index * loop.cached,
                           loop.cached};
  const Frame<T> frame = block_frame(args.logits);
  cache.fetch_all(team, row_or_nothing(args.logits, frame, loop.row(team_index, loop.steps - 1)));
  if (args.columns_shared) {
    log_q.stage(block, frame);
    __syncthreads();
  }
  const GradientScale<A> scale = args.gradient_scale();

  for (int64_t step = loop.steps - 1; step >= 0; --step) {
    const int64_t index = loop.row(team_index, step);
    const bool present = index < args.logits.rows;
    const Row<T> row = row_or_nothing(args.logits, frame, index);
    const Row<T> next = row_or_nothing(args.logits, frame,
                                       step > 0 ? loop.row(team_index, step - 1) : INT64_MAX);

    copies_wait();
    GradientRow<A> gradient(
        RowStatistics<A>::load(args.row_stats + (present ? index : 0) * kRowStats), scale);
    gradient.mean_log_marginal = mean_log_marginal<A>(team, cache, row, gradient, log_q);
    cache.for_each(team, row, [&](int slot, const Slot<T>& z) {
      if (next.frame.slots != 0) cache.fetch(next, slot);
      store_gradient(row.frame, slot, z, gradient, log_q,
                     args.grad + index * args.logits.columns, args.stream);
    });
    if (!present) cache.fetch_all(team, next);
  }
}

}  // namespace ueo_fast::cuda
