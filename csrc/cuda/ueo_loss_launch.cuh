// Which kernels run, one after the other, for a call: the same for a GPU (ueo_loss.cu) and for the
// host (tests/cpp/cuda_host). A launcher has run(kernel, grid, arguments...).
#pragma once

#include "max_softmax.cuh"
#include "ueo_loss.cuh"
#include "ueo_loss.h"
#include "ueo_loss_marginal.cuh"
#include "ueo_loss_one_pass.cuh"

namespace ueo_fast::cuda {

template <class T>
Matrix<T> matrix_of(const LogitsView& logits) {
  const T* data = static_cast<const T*>(logits.data);
  return {data, data + (logits.rows - 1) * logits.row_stride + logits.columns, logits.rows,
          logits.row_stride, static_cast<int>(logits.columns)};
}

inline RowLoop loop_of(const RowShape& row, const RowPlan& plan) {
  return {plan.lanes, plan.teams, row.slots, plan.cached, plan.steps};
}

// The kernel for rows that a block shares, or for rows of lanes.
#define UEO_FAST_PICK(kernel, T, block_team) ((block_team) ? &kernel<T, true> : &kernel<T, false>)

template <class A>
struct Part {
  unsigned char* base;
  template <class P>
  P* at(int64_t offset) const {
    return reinterpret_cast<P*>(base + offset);
  }
};

// Given weights, and who looks for their range.
template <class A, class Launcher>
bool prepare_weights(Launcher& launcher, const Weights<A>& weights, int64_t rows,
                     WeightRange* range) {
  const bool given = weights.confidence != nullptr || weights.marginal_weights != nullptr;
  if (!given || rows <= tuning::kScanRows) return given;
  launcher.run(&ueo_weight_range<A>, Grid{1, tuning::kScanThreads, kScratchBytes}, weights, rows,
               range);
  return false;
}

template <class A>
MarginalArguments<A> marginal_arguments(const ForwardCall& call, const Part<A>& workspace,
                                        const Workspace& at, int64_t partials, int blocks) {
  return {workspace.template at<A>(at.partial_sums),
          partials,
          static_cast<int>(call.logits.columns),
          workspace.template at<double>(at.block_sums),
          blocks,
          call.logits.rows,
          call.confidence == nullptr ? nullptr : workspace.template at<WeightRange>(at.range),
          call.options.trade_off,
          static_cast<A>(call.options.eps),
          static_cast<A*>(call.marginal),
          workspace.template at<double>(at.tile_entropies),
          workspace.template at<unsigned>(at.finished),
          static_cast<A*>(call.summary),
          static_cast<A*>(call.loss)};
}

template <class T, class Launcher>
void run_forward(Launcher& launcher, const Device& device, const ForwardCall& call) {
  using A = ComputeType<T>;
  const RowShape row = shape_of(call.logits);
  const RowPlan plan = plan_rows(device, row, call.logits.rows, PerColumn::kPerTeam);
  const Workspace at(row, plan, OnePassPlan{});
  const Part<A> workspace{static_cast<unsigned char*>(call.workspace)};
  const Weights<A> weights{static_cast<const A*>(call.confidence),
                           static_cast<const A*>(call.marginal_weights)};
  WeightRange* range = workspace.template at<WeightRange>(at.range);
  const bool scan = prepare_weights(launcher, weights, call.logits.rows, range);
  const StatisticsArguments<T> statistics{
      matrix_of<T>(call.logits),
      weights,
      static_cast<A>(call.options.confidence_scale),
      static_cast<A>(call.options.eps),
      loop_of(row, plan),
      scan,
      range,
      plan.columns_shared ? nullptr : workspace.template at<A>(at.column_sums),
      static_cast<A*>(call.row_stats),
      workspace.template at<A>(at.partial_sums),
      workspace.template at<double>(at.block_sums),
      workspace.template at<unsigned>(at.finished)};
  launcher.run(UEO_FAST_PICK(ueo_statistics, T, plan.block_team), plan.grid, statistics);
  const int threads = tuning::kMarginalThreads;
  launcher.run(&ueo_marginal<A>, Grid{marginal_tiles(row), threads, kScratchBytes + threads * 8},
               marginal_arguments(call, workspace, at, partial_sums_of(plan), plan.grid.blocks));
}

template <class T, class Launcher>
void run_backward(Launcher& launcher, const Device& device, const BackwardCall& call) {
  using A = ComputeType<T>;
  const RowShape row = shape_of(call.logits);
  const RowPlan plan = plan_rows(device, row, call.logits.rows, PerColumn::kPerBlock);
  const int64_t bytes = call.logits.rows * call.logits.columns * int64_t{sizeof(T)};
  const GradientArguments<T> gradient{
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
  launcher.run(UEO_FAST_PICK(ueo_gradient, T, plan.block_team), plan.grid, gradient);
}

template <class T, class Launcher>
void run_one_pass(Launcher& launcher, const Device& device, const ForwardCall& call, void* grad) {
  using A = ComputeType<T>;
  const RowShape row = shape_of(call.logits);
  const OnePassPlan plan = plan_one_pass(device, row, call.logits.rows);
  const Workspace at(row, RowPlan{}, plan);
  const Part<A> workspace{static_cast<unsigned char*>(call.workspace)};
  const Weights<A> weights{static_cast<const A*>(call.confidence),
                           static_cast<const A*>(call.marginal_weights)};
  WeightRange* range = workspace.template at<WeightRange>(at.range);
  const bool scan = prepare_weights(launcher, weights, call.logits.rows, range);
  const OnePassArguments<T> one_pass{
      matrix_of<T>(call.logits),
      weights,
      static_cast<A>(call.options.confidence_scale),
      scan,
      range,
      plan.lanes,
      plan.teams,
      row.slots,
      plan.shared_rows,
      plan.held_rows,
      plan.rows_per_block,
      plan.sum_groups,
      workspace.template at<double>(at.block_sums),
      workspace.template at<A>(at.partial_sums),
      marginal_arguments(call, workspace, at, plan.grid.blocks, plan.grid.blocks),
      static_cast<T*>(grad)};
  launcher.run(UEO_FAST_PICK(ueo_one_pass, T, plan.block_team), plan.grid, one_pass);
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
