// Steps 5 to 7 after all rows have been seen: column sums to marginal, entropies to loss. Sums over
// blocks are in double and in a fixed order: the same input gives the same bits.
#pragma once

#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

template <class A>
struct MarginalArguments {
  const A* partial_sums;      // (partials, columns)
  int64_t partials;
  int columns;
  const double* block_sums;   // (blocks, 3): sums of w, v, w H
  int blocks;
  int64_t rows;
  const WeightRange* range;   // of given confidences; null without
  double trade_off;
  A eps;
  A* marginal;                // (columns,)
  double* tile_entropies;     // (tiles,)
  unsigned* finished;         // blocks that have written their tile; 0 at first
  A* summary;                 // (kSummary,)
  A* loss;                    // 0-d
};

// Sums over the blocks of a batch; the same bits wherever they are added.
struct BatchSums {
  double confidence;
  double marginal_weight;
  double weighted_entropy;
};

__device__ __forceinline__ BatchSums batch_sums(BlockTeam& block, const double* block_sums,
                                                int blocks) {
  double total[3] = {0, 0, 0};
  for (int b = block.rank; b < blocks; b += block.size) {
    for (int i = 0; i < 3; ++i) total[i] += block_sums[b * 3 + i];
  }
  block.reduce(Sum{}, total);
  return {total[0], total[1], total[2]};
}

// Steps 5 and 6 of kMarginalColumns columns: a lane per column, the block's warps share the partial
// sums. `scratch` is a double for each thread.
template <class A>
__device__ void marginal_tile(const MarginalArguments<A>& args, const BlockTeam& block, int tile,
                              double inverse_weight_sum, double* scratch) {
  static_assert(tuning::kMarginalColumns == 32);
  LaneTeam lanes{block.rank % 32, 32};
  const int group = block.rank / 32;
  const int groups = block.size / 32;
  const int column = tile * tuning::kMarginalColumns + lanes.rank;
  double sum = 0;
  if (column < args.columns) {
#pragma unroll 8
    for (int64_t partial = group; partial < args.partials; partial += groups) {
      sum += args.partial_sums[partial * args.columns + column];
    }
  }
  scratch[block.rank] = sum;
  __syncthreads();
  if (group == 0) {
    for (int g = 1; g < groups; ++g) sum += scratch[g * 32 + lanes.rank];
    double entropy[1] = {0};
    if (column < args.columns) {
      const A q = static_cast<A>(sum * inverse_weight_sum);
      args.marginal[column] = q;
      const A log_q = log2_of(args.eps == 0 && q < kSmallestNormal<A> ? kSmallestNormal<A>
                                                                      : q + args.eps);
      entropy[0] = -static_cast<double>(q) * log_q * kLn2<double>;
    }
    lanes.reduce(Sum{}, entropy);
    if (lanes.rank == 0) args.tile_entropies[tile] = entropy[0];
  }
  __syncthreads();  // before `scratch` is written again
}

// Step 7, by one block that sees every tile.
template <class A>
__device__ void finish_loss(const MarginalArguments<A>& args, BlockTeam& block, int tiles,
                            const BatchSums& sums) {
  double entropy[1] = {0};
  for (int tile = block.rank; tile < tiles; tile += block.size) {
    entropy[0] += args.tile_entropies[tile];
  }
  block.reduce(Sum{}, entropy);
  if (block.rank != 0) return;
  const double conditional = sums.weighted_entropy / sums.confidence;
  const double unit = args.range == nullptr ? 1.0 : args.range->largest_confidence;
  args.summary[kConditionalEntropy] = static_cast<A>(conditional);
  args.summary[kMarginalEntropy] = static_cast<A>(entropy[0]);
  args.summary[kMeanConfidence] = static_cast<A>(sums.confidence / args.rows * unit);
  args.summary[kConfidenceSum] = static_cast<A>(sums.confidence);
  args.summary[kMarginalWeightSum] = static_cast<A>(sums.marginal_weight);
  *args.loss = static_cast<A>(conditional - args.trade_off * entropy[0]);
}

// A block per tile of columns; whoever comes last finishes the loss.
template <class A>
UEO_FAST_KERNEL __launch_bounds__(tuning::kMarginalThreads)
    ueo_marginal(MarginalArguments<A> args) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  BlockTeam block{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), scratch};
  const BatchSums sums = batch_sums(block, args.block_sums, args.blocks);
  double* tile_scratch = scratch + kScratchBytes / 8;
  marginal_tile(args, block, static_cast<int>(blockIdx.x), 1 / sums.marginal_weight, tile_scratch);
  if (block.rank == 0) {
    __threadfence();  // this block's entropy before its mark
    tile_scratch[0] = atomicAdd(args.finished, 1u);
  }
  __syncthreads();
  if (tile_scratch[0] != gridDim.x - 1) return;
  __threadfence();  // all marks before all entropies
  finish_loss(args, block, static_cast<int>(gridDim.x), sums);
}

}  // namespace ueo_fast::cuda
