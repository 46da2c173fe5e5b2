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
  void* workspace;               // forward_workspace() bytes
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

inline RowShape shape_of(const LogitsView& logits) {
  return RowShape(logits.columns, bytes_of(logits.storage));
}

// How the statistics kernel goes over the rows: in registers, by blocks, or, where neither fits, as
// any.
struct StatisticsPlan {
  RegisterPlan registers;
  SharedRowPlan shared;
  RowPlan any;

  StatisticsPlan(const Device& device, const LogitsView& logits, bool plain)
      : any(plan_rows(device, shape_of(logits), logits.rows, PerColumn::kPerTeam)) {
    const auto plan = [&]<int kElementBytes>() {
      const RowShape row = shape_of(logits);
      registers = plan_registers<kElementBytes>(device, row, logits.rows, plain,
                                                /*sums_per_team=*/true);
      if (!registers.fits && plain) shared = plan_shared_rows<kElementBytes>(device, row, logits.rows);
    };
    if (bytes_of(logits.storage) == 4) plan.operator()<4>();
    if (bytes_of(logits.storage) == 2) plan.operator()<2>();
  }
  // Blocks, each of which leaves sums behind, and their rows of column sums.
  int blocks() const {
    return (registers.fits ? registers.grid : shared.fits ? shared.grid : any.grid).blocks;
  }
  int64_t partials() const {
    const int64_t steps = registers.fits ? registers.steps : shared.fits ? shared.steps : any.steps;
    return partial_sums_of(blocks(), steps);
  }
};

// Parts of the workspace of a forward pass, and where they begin.
struct WorkspaceLayout {
  int64_t partial_sums;
  int64_t column_sums;
  int64_t block_sums;
  int64_t entropies;
  int64_t range;
  int64_t finished;
  int64_t bytes = 0;

  WorkspaceLayout(const RowShape& row, const StatisticsPlan& plan) {
    const auto add = [&](int64_t size) {
      const int64_t begin = bytes;
      bytes += divide_up(size, 256) * 256;
      return begin;
    };
    partial_sums = add(plan.partials() * column_stride(row.columns) * row.compute_bytes);
    const bool global = !plan.registers.fits && !plan.shared.fits && !plan.any.columns_shared;
    column_sums = add(global ? plan.blocks() * plan.any.teams * row.column_bytes() : 0);
    block_sums = add(int64_t{plan.blocks()} * 3 * 8);
    entropies = add(8 * divide_up(row.columns, tuning::kPieceColumns));
    range = add(sizeof(WeightRange) * (1 + tuning::kMostScanBlocks));
    finished = add(sizeof(unsigned));
  }
};

// Bytes that a call's workspace needs.
inline int64_t forward_workspace(const Device& device, const LogitsView& logits) {
  const RowShape row = shape_of(logits);
  return std::max(WorkspaceLayout(row, StatisticsPlan(device, logits, /*plain=*/true)).bytes,
                  WorkspaceLayout(row, StatisticsPlan(device, logits, /*plain=*/false)).bytes);
}

// Each is compiled once per storage type and returns a cudaError_t.
template <Storage storage>
int ueo_forward(const Device& device, void* stream, const ForwardCall& call);
template <Storage storage>
int ueo_backward(const Device& device, void* stream, const BackwardCall& call);
template <Storage storage>
int max_softmax(const Device& device, void* stream, const LogitsView& logits, double scale,
                void* out);

}  // namespace ueo_fast::cuda
