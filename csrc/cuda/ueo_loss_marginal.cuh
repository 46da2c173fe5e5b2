// Steps 5 to 7 after all rows have been seen: column sums to marginal, entropies to loss. Sums over
// blocks are in double and in a fixed order: the same input gives the same bits.
#pragma once

#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

template <class A>
struct MarginalArguments {
  const A* partial_sums;      // (partials, column_stride)
  int64_t partials;
  int64_t column_stride;      // a multiple of kPieceColumns
  int columns;
  int tile_lanes;             // threads for the columns of a tile, kPieceColumns each; a power of two
  const double* block_sums;   // (blocks, 3): sums of w, v, w H
  int blocks;                 // of the statistics kernel
  int64_t rows;
  const WeightRange* range;   // of given confidences; null without
  double trade_off;
  A eps;
  A* marginal;                // (columns,)
  double* entropies;          // (blocks,)
  unsigned* finished;         // blocks that have written their entropy; 0 at first
  A* summary;                 // (kSummary,)
  A* loss;                    // 0-d
};

template <class A>
struct alignas(16) Piece {
  A x[tuning::kPieceColumns];
};

// At least one tile of columns per block (plan_marginal); the last block to finish writes the loss.
template <class A>
UEO_FAST_KERNEL __launch_bounds__(tuning::kMarginalThreads)
    ueo_marginal(MarginalArguments<A> args) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double* shared = scratch + kScratchBytes / 8;  // one for each thread and column of its piece
  BlockTeam block{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), scratch};
  const int threads = block.size;
  constexpr int kWide = tuning::kPieceColumns;
  double batch[3] = {0, 0, 0};  // sums of w, v, w H
  for (int b = block.rank; b < args.blocks; b += threads) {
    for (int i = 0; i < 3; ++i) batch[i] += args.block_sums[b * 3 + i];
  }
  const int lanes = args.tile_lanes;
  const int tile_columns = lanes * kWide;
  const int lane = block.rank & (lanes - 1);
  const int groups = threads / lanes;  // which share the partial sums
  const int sets = lanes < 32 ? threads / 32 : groups;
  const int set = lanes < 32 ? block.rank / 32 : block.rank / lanes;
  double entropy[1] = {0};
  double inverse_weight_sum = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile * tile_columns < args.columns;
       tile += static_cast<int>(gridDim.x)) {
    const int column = tile * tile_columns + lane * kWide;
    double sums[kWide] = {};
    if (column < args.columns) {
#pragma unroll 4
      for (int64_t partial = block.rank / lanes; partial < args.partials; partial += groups) {
        const Piece<A> piece = *reinterpret_cast<const Piece<A>*>(
            args.partial_sums + partial * args.column_stride + column);
#pragma unroll
        for (int k = 0; k < kWide; ++k) sums[k] += piece.x[k];
      }
    }
    if (tile == static_cast<int>(blockIdx.x)) {  // after the loads of both are under way
      block.reduce(Sum{}, batch);
      inverse_weight_sum = 1 / batch[1];
    }
    for (int offset = 16; offset >= lanes; offset /= 2) {
#pragma unroll
      for (int k = 0; k < kWide; ++k) sums[k] += __shfl_xor_sync(kAllLanes, sums[k], offset);
    }
    if (lanes >= 32 || block.rank % 32 < lanes) {
#pragma unroll
      for (int k = 0; k < kWide; ++k) shared[set * tile_columns + lane * kWide + k] = sums[k];
    }
    __syncthreads();
    for (int i = block.rank; i < tile_columns; i += threads) {
      const int c = tile * tile_columns + i;
      if (c >= args.columns) break;
      double sum = 0;
      for (int s = 0; s < sets; ++s) sum += shared[s * tile_columns + i];
      const A q = static_cast<A>(sum * inverse_weight_sum);
      args.marginal[c] = q;
      const A log_q = log2_of(args.eps == 0 && q < kSmallestNormal<A> ? kSmallestNormal<A>
                                                                      : q + args.eps);
      entropy[0] -= static_cast<double>(q) * log_q * kLn2<double>;
    }
    __syncthreads();  // before `shared` is written again
  }
  block.reduce(Sum{}, entropy);

  // Step 7, by one block: the only one, or the last, which sees the entropies of all.
  if (gridDim.x > 1) {
    if (block.rank == 0) {
      args.entropies[blockIdx.x] = entropy[0];
      __threadfence();  // this block's entropy before its mark
      shared[0] = atomicAdd(args.finished, 1u);
    }
    __syncthreads();
    if (shared[0] != gridDim.x - 1) return;
    __threadfence();  // all marks before all entropies
    entropy[0] = 0;
    for (int i = block.rank; i < static_cast<int>(gridDim.x); i += threads) {
      entropy[0] += args.entropies[i];
    }
    block.reduce(Sum{}, entropy);
  }
  if (block.rank != 0) return;
  const double conditional = batch[2] / batch[0];
  const double unit = args.range == nullptr ? 1.0 : args.range->largest_confidence;
  args.summary[kConditionalEntropy] = static_cast<A>(conditional);
  args.summary[kMarginalEntropy] = static_cast<A>(entropy[0]);
  args.summary[kMeanConfidence] = static_cast<A>(batch[0] / args.rows * unit);
  args.summary[kConfidenceSum] = static_cast<A>(batch[0]);
  args.summary[kMarginalWeightSum] = static_cast<A>(batch[1]);
  *args.loss = static_cast<A>(conditional - args.trade_off * entropy[0]);
}

}  // namespace ueo_fast::cuda
