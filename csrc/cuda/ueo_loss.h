// What the glue asks of the kernels: raw pointers and a stream, neither torch nor CUDA headers.
#pragma once

#include <cstdint>

#include "../ueo_loss.h"
#include "launch.h"

namespace ueo_fast::cuda {

// Numbers are float, double where the logits are double. Pointers are to the logits' device.
struct ForwardCall {
  LogitsView logits;             // at least one row, at most 2^30 - 1 columns
  UeoOptions options;
  const void* confidence;        // (rows,) or null
  const void* marginal_weights;  // (rows,) or null
  void* loss;                    // 0-d
  void* summary;                 // (kSummary,)
  void* marginal;                // (columns,)
  void* row_stats;               // (rows, kRowStats)
  void* workspace;               // forward_workspace() or one_pass_workspace() bytes
};

struct BackwardCall {
  LogitsView logits;
  UeoOptions options;
  const void* grad_loss;  // 0-d; null for 1
  const void* summary;
  const void* marginal;
  const void* row_stats;
  void* grad;             // (rows, columns) contiguous, of the logits' storage type
};

// What the batch needs of its given weights: scaled to at most 1, no sum of them overflows.
struct WeightRange {
  double largest_confidence;
  double smallest_confidence;
  double largest_marginal_weight;
};

inline int element_bytes(Storage storage) {
  return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2;
}

// Parts of the workspace of a forward pass, and where they begin.
struct Workspace {
  int64_t partial_sums;
  int64_t column_sums;
  int64_t block_sums;
  int64_t tile_entropies;
  int64_t range;
  int64_t finished;
  int64_t bytes = 0;

  Workspace(const RowShape& row, const RowPlan& plan, const OnePassPlan& one_pass) {
    const auto add = [&](int64_t size) {
      const int64_t begin = bytes;
      bytes += divide_up(size, 256) * 256;
      return begin;
    };
    const int64_t partials = one_pass.fits ? one_pass.grid.blocks : partial_sums_of(plan);
    const int64_t blocks = one_pass.fits ? one_pass.grid.blocks : plan.grid.blocks;
    partial_sums = add(partials * row.columns * row.compute_bytes);
    column_sums = add(plan.columns_shared || one_pass.fits
                          ? 0
                          : blocks * plan.teams * row.column_bytes());
    block_sums = add(blocks * 3 * 8);
    tile_entropies = add(marginal_tiles(row) * 8);
    range = add(sizeof(WeightRange));
    finished = add(sizeof(unsigned));
  }
};

inline RowShape shape_of(const LogitsView& logits) {
  return RowShape(logits.columns, element_bytes(logits.storage));
}

// Bytes that a call's workspace needs.
inline int64_t forward_workspace(const Device& device, const LogitsView& logits) {
  const RowShape row = shape_of(logits);
  return Workspace(row, plan_rows(device, row, logits.rows, PerColumn::kPerTeam), {}).bytes;
}
inline OnePassPlan one_pass_of(const Device& device, const LogitsView& logits) {
  return plan_one_pass(device, shape_of(logits), logits.rows);
}
inline int64_t one_pass_workspace(const Device& device, const LogitsView& logits) {
  return Workspace(shape_of(logits), {}, one_pass_of(device, logits)).bytes;
}

// Each is compiled once per storage type and returns a cudaError_t.
template <Storage storage>
int ueo_forward(const Device& device, void* stream, const ForwardCall& call);
template <Storage storage>
int ueo_backward(const Device& device, void* stream, const BackwardCall& call);
// Both at once, for an upstream gradient of 1 and a batch that fits on the chip (one_pass_of); row_stats
// is not written. grad: as that of BackwardCall.
template <Storage storage>
int ueo_one_pass(const Device& device, void* stream, const ForwardCall& call, void* grad);
template <Storage storage>
int max_softmax(const Device& device, void* stream, const LogitsView& logits, double scale,
                void* out);

}  // namespace ueo_fast::cuda
