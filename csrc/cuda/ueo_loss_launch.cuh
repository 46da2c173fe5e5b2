// Which kernels run, one after the other, for a call: the same for a GPU (ueo_loss.cu) and for the
// host (tests/cpp/cuda_host). A launcher has run(kernel, grid, arguments...).
#pragma once

#include <iterator>

#include "max_softmax.cuh"
#include "ueo_loss.cuh"
#include "ueo_loss.h"
#include "ueo_loss_block.cuh"
#include "ueo_loss_marginal.cuh"

namespace ueo_fast::cuda {

template <class T>
Matrix<T> matrix_of(const LogitsView& logits) {
  return matrix_of<T>(logits.data, logits.rows, logits.columns, logits.row_stride);
}

// Calls f with a kernel's template arguments: those of the plan. No double row is held in registers.
template <class T, int kShape = 0, class F>
void with_shape(int shape, F&& f) {
  if constexpr (sizeof(T) < 8 && kShape < std::size(kRegisterShapes<sizeof(T)>)) {
    constexpr RegisterShape kThis = kRegisterShapes<sizeof(T)>[kShape];
    if (shape == kShape) {
      f.template operator()<kThis.slots, kThis.lanes>();
    } else {
      with_shape<T, kShape + 1>(shape, f);
    }
  }
}

// The same for the slots per thread of a row that a block shares.
template <class T, class F>
void with_slots(bool many, F&& f) {
  if constexpr (sizeof(T) < 8) {
    if (many) {
      f.template operator()<kManySlots<sizeof(T)>>();
    } else {
      f.template operator()<kFewSlots<sizeof(T)>>();
    }
  }
}

// No option beyond the trade-off: this common case has specialised kernels.
inline bool is_plain(const ForwardCall& call) {
  return call.options.confidence_scale == 1 && call.options.eps == 0 &&
         call.confidence == nullptr && call.marginal_weights == nullptr;
}

// The kernel for rows that a block shares, or for rows of lanes.
#define UEO_FAST_PICK(kernel, T, block_team) ((block_team) ? &kernel<T, true> : &kernel<T, false>)

struct WorkspaceMemory {
  unsigned char* base;
  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(base + offset);
  }
};

// Finds the ranges of parts of the given weights in a separate launch, if there are many; returns the
// number of parts.
template <class A, class Launcher>
int scan_parts(Launcher& launcher, const Weights<A>& weights, int64_t rows, WeightRange* parts) {
  const bool given = weights.confidence != nullptr || weights.marginal_weights != nullptr;
  if (!given || rows <= tuning::kScanRows) return 0;
  launcher.run(&ueo_weight_range<A>, scan_grid(rows), weights, rows, parts);
  return scan_grid(rows).blocks;
}

template <class A>
MarginalArguments<A> marginal_arguments(const ForwardCall& call, const WorkspaceMemory& workspace,
                                        const WorkspaceLayout& layout, const StatisticsPlan& plan,
                                        int tile_lanes) {
  const int columns = static_cast<int>(call.logits.columns);
  return {workspace.at<A>(layout.partial_sums),
          plan.partials(),
          column_stride(columns),
          columns,
          tile_lanes,
          workspace.at<double>(layout.block_sums),
          plan.blocks(),
          call.logits.rows,
          call.confidence == nullptr ? nullptr : workspace.at<WeightRange>(layout.range),
          call.options.trade_off,
          static_cast<A>(call.options.eps),
          static_cast<A*>(call.marginal),
          workspace.at<double>(layout.entropies),
          workspace.at<unsigned>(layout.finished),
          static_cast<A*>(call.summary),
          static_cast<A*>(call.loss)};
}

template <class T, class Launcher>
void run_forward(Launcher& launcher, const Device& device, const ForwardCall& call) {
  using A = ComputeType<T>;
  const RowShape row = shape_of(call.logits);
  const bool plain = is_plain(call);
  const StatisticsPlan plan(device, call.logits, plain);
  const WorkspaceLayout layout(row, plan);
  const WorkspaceMemory workspace{static_cast<unsigned char*>(call.workspace)};
  const Weights<A> weights{static_cast<const A*>(call.confidence),
                           static_cast<const A*>(call.marginal_weights)};
  WeightRange* range = workspace.at<WeightRange>(layout.range);
  const int ranges = scan_parts(launcher, weights, call.logits.rows, range + 1);
  StatisticsArguments<T> statistics{
      matrix_of<T>(call.logits),
      weights,
      static_cast<A>(call.options.confidence_scale),
      static_cast<A>(call.options.eps),
      loop_of(row, plan.any),
      ranges,
      range,
      plan.any.columns_shared ? nullptr : workspace.at<A>(layout.column_sums),
      static_cast<A*>(call.row_stats),
      workspace.at<A>(layout.partial_sums),
      column_stride(row.columns),
      workspace.at<double>(layout.block_sums),
      workspace.at<unsigned>(layout.finished)};
  if (plan.registers.fits) {
    statistics.loop.steps = plan.registers.steps;
    with_shape<T>(plan.registers.shape, [&]<int kSlots, int kLanes>() {
      launcher.run(plain ? &ueo_statistics<T, kSlots, kLanes, true>
                         : &ueo_statistics<T, kSlots, kLanes, false>,
                   plan.registers.grid, statistics);
    });
  } else if (plan.shared.fits) {
    statistics.loop.steps = plan.shared.steps;
    with_slots<T>(plan.shared.many, [&]<int kSlots>() {
      launcher.run(&ueo_statistics_block<T, kSlots>, plan.shared.grid, statistics);
    });
  } else {
    launcher.run(UEO_FAST_PICK(ueo_statistics_any, T, plan.any.block_team), plan.any.grid,
                 statistics);
  }
  const MarginalPlan marginal = plan_marginal(device, row.columns, plan.partials());
  launcher.run(&ueo_marginal<A>, marginal.grid,
               marginal_arguments<A>(call, workspace, layout, plan, marginal.tile_lanes));
}

template <class T, class Launcher>
void run_backward(Launcher& launcher, const Device& device, const BackwardCall& call) {
  using A = ComputeType<T>;
  const RowShape row = shape_of(call.logits);
  const RowPlan plan = plan_rows(device, row, call.logits.rows, PerColumn::kPerBlock);
  const int64_t bytes = call.logits.rows * call.logits.columns * int64_t{sizeof(T)};
  GradientArguments<T> gradient{
      matrix_of<T>(call.logits),
      static_cast<const A*>(call.grad_loss),
      static_cast<const A*>(call.summary),
      static_cast<const A*>(call.marginal),
      static_cast<const A*>(call.row_stats),
      call.options.trade_off,
      static_cast<A>(call.options.eps),
      loop_of(row, plan),
      plan.columns_shared,
      static_cast<double>(bytes) > tuning::kStreamShareOfL2 * static_cast<double>(device.l2_bytes),
      static_cast<T*>(call.grad)};
  const bool plain = call.options.eps == 0;
  const RegisterPlan registers = plan_registers<sizeof(T)>(device, row, call.logits.rows, plain,
                                                           /*sums_per_team=*/false);
  const SharedRowPlan shared = plan_shared_rows<sizeof(T)>(device, row, call.logits.rows);
  // Rows of the gradient start where those of the logits do, counted in slots.
  const bool aligned = reinterpret_cast<uintptr_t>(call.logits.data) % 16 ==
                           reinterpret_cast<uintptr_t>(call.grad) % 16 &&
                       (call.logits.row_stride - call.logits.columns) % row.per_slot == 0;
  if (registers.fits && aligned) {
    gradient.loop.steps = registers.steps;
    with_shape<T>(registers.shape, [&]<int kSlots, int kLanes>() {
      launcher.run(plain ? &ueo_gradient<T, kSlots, kLanes, true>
                         : &ueo_gradient<T, kSlots, kLanes, false>,
                   registers.grid, gradient);
    });
  } else if (shared.fits && !registers.fits && plain) {
    gradient.loop.steps = shared.steps;
    with_slots<T>(shared.many, [&]<int kSlots>() {
      launcher.run(&ueo_gradient_block<T, kSlots>, shared.grid, gradient);
    });
  } else {
    launcher.run(UEO_FAST_PICK(ueo_gradient_any, T, plan.block_team), plan.grid, gradient);
  }
}

template <class T, class Launcher>
void run_max_softmax(Launcher& launcher, const Device& device, const LogitsView& logits,
                     double scale, void* out) {
  using A = ComputeType<T>;
  const RowShape row = shape_of(logits);
  const RowPlan plan = plan_rows(device, row, logits.rows, PerColumn::kNone);
  const MaxSoftmaxArguments<T> arguments{matrix_of<T>(logits), static_cast<A>(scale),
                                         loop_of(row, plan), static_cast<A*>(out)};
  launcher.run(UEO_FAST_PICK(max_softmax, T, plan.block_team), plan.grid, arguments);
}

}  // namespace ueo_fast::cuda
