// Which kernels run for a call of layer_norm: the same for a GPU (layer_norm.cu) and for the host
// (tests/cpp/cuda_host). A launcher has run(kernel, grid, arguments...).
#pragma once

#include "layer_norm.cuh"
#include "layer_norm.h"

namespace ueo_fast::cuda {

template <class T>
Matrix<T> matrix_of(const NormRows& rows) {
  return matrix_of<T>(rows.data, rows.rows, rows.columns, rows.row_stride);
}

template <class T, class Launcher>
void run_layer_norm(Launcher& launcher, const Device& device, const NormForwardCall& call) {
  using A = ComputeType<T>;
  const RowShape row(call.x.columns, sizeof(T));
  const RowPlan plan = plan_norm_forward(device, row, call.x.rows);
  const NormForwardArguments<T> arguments{matrix_of<T>(call.x),
                                          static_cast<const A*>(call.weight),
                                          static_cast<const A*>(call.bias),
                                          static_cast<A>(call.eps),
                                          loop_of(row, plan),
                                          plan.columns_shared,
                                          static_cast<T*>(call.out),
                                          static_cast<A*>(call.mean),
                                          static_cast<A*>(call.rstd)};
  launcher.run(plan.block_team ? &layer_norm<T, true> : &layer_norm<T, false>, plan.grid,
               arguments);
}

// Whether every row of `a` starts at the same place in its slots as that of `b` with its number:
// blocks meet rows a multiple of kPerSlot apart, so the strides need to agree up to that.
template <class T>
bool same_places(const NormRows& a, const NormRows& b) {
  const auto place = [](const NormRows& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) / sizeof(T) % kPerSlot<T>;
  };
  return place(a) == place(b) && (a.row_stride - b.row_stride) % kPerSlot<T> == 0;
}

template <class T, class Launcher>
void run_layer_norm_gradient(Launcher& launcher, const Device& device,
                             const NormBackwardCall& call) {
  using A = ComputeType<T>;
  const bool sums = call.sums != nullptr;
  const RowShape row(call.x.columns, sizeof(T));
  const RowPlan plan = plan_norm_backward(device, row, call.x.rows, sums);
  const NormWorkspace layout(row, plan);
  unsigned char* const workspace = static_cast<unsigned char*>(call.workspace);
  const bool own = sums && !plan.columns_shared;
  A* partials = reinterpret_cast<A*>(workspace);
  const NormBackwardArguments<T> arguments{
      matrix_of<T>(call.grad_out),
      matrix_of<T>(call.x),
      same_places<T>(call.grad_out, call.x),
      static_cast<const A*>(call.mean),
      static_cast<const A*>(call.rstd),
      static_cast<const A*>(call.weight),
      loop_of(row, plan),
      plan.columns_shared,
      static_cast<T*>(call.grad_x),
      own ? reinterpret_cast<A*>(workspace + layout.column_sums) : nullptr,
      partials};
  if (plan.block_team) {
    launcher.run(sums ? &layer_norm_gradient<T, true, true> : &layer_norm_gradient<T, true, false>,
                 plan.grid, arguments);
  } else {
    launcher.run(
        sums ? &layer_norm_gradient<T, false, true> : &layer_norm_gradient<T, false, false>,
        plan.grid, arguments);
  }
  if (!sums) return;
  const int count = static_cast<int>(partial_sums_of(plan.grid.blocks, plan.steps));
  int per_block = 0;
  const Grid grid = totals_grid(2 * call.x.columns, count, per_block);
  launcher.run(&layer_norm_totals<A>, grid, row.columns, count, per_block,
               static_cast<const A*>(partials), static_cast<A*>(call.sums));
}

}  // namespace ueo_fast::cuda
