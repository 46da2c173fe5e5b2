// What the glue asks of the kernels of layer_norm: raw pointers and a stream, neither torch nor
// CUDA headers.
#pragma once

#include "affine_launch.h"
#include "channel_affine.h"

namespace ueo_fast::cuda {

// (rows, columns), the columns adjacent, rows row_stride elements apart; both at least 1, at most
// 2^30 columns. Numbers are in the compute dtype.
struct NormRows {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

struct NormForwardCall {
  NormRows x;
  const void* weight;  // (columns,) or null for 1
  const void* bias;    // (columns,) or null for 0
  double eps;
  void* out;           // (rows, columns) contiguous
  void* mean;          // (rows,)
  void* rstd;          // (rows,)
};

struct NormBackwardCall {
  NormRows grad_out;
  NormRows x;
  const void* mean;
  const void* rstd;
  const void* weight;  // or null
  void* grad_x;        // (rows, columns) contiguous; null if it is not needed
  void* sums;          // (2, columns): of grad_out (x - mean) rstd and of grad_out; null likewise
  void* workspace;     // norm_backward_workspace() bytes
};

inline RowPlan plan_norm_forward(const Device& device, const RowShape& row, int64_t rows) {
  return plan_norm(device, row, rows, {1, 2, 0});
}
inline RowPlan plan_norm_backward(const Device& device, const RowShape& row, int64_t rows,
                                  bool sums) {
  return plan_norm(device, row, rows, {2, 1, sums ? 2 : 0});
}

// Of the backward pass with sums: partial sums, and sums of teams that find no room in shared
// memory.
struct NormWorkspace {
  int64_t column_sums;  // where they begin
  int64_t bytes;

  NormWorkspace(const RowShape& row, const RowPlan& plan)
      : column_sums(divide_up(partial_sums_of(plan.grid.blocks, plan.steps) * 2 * row.columns *
                                  row.compute_bytes,
                              256) *
                    256),
        bytes(column_sums + (plan.columns_shared
                                 ? 0
                                 : int64_t{2} * plan.grid.blocks * plan.teams *
                                       row.column_bytes())) {}
};

inline int64_t norm_backward_workspace(const Device& device, int64_t rows, int64_t columns,
                                       Storage storage) {
  const RowShape row(columns, bytes_of(storage));
  return NormWorkspace(row, plan_norm_backward(device, row, rows, true)).bytes;
}

// Each is compiled once per storage type and returns a cudaError_t.
template <Storage storage>
int layer_norm_forward(const Device& device, void* stream, const NormForwardCall& call);
template <Storage storage>
int layer_norm_backward(const Device& device, void* stream, const NormBackwardCall& call);

}  // namespace ueo_fast::cuda
