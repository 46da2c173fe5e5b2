// Which kernels run for a call of channel_affine: the same for a GPU (channel_affine.cu) and for
// the host (tests/cpp/cuda_host). A launcher has run(kernel, grid, arguments...).
#pragma once

#include "channel_affine.cuh"
#include "channel_affine.h"

namespace ueo_fast::cuda {

template <class T>
Source<T> source_of(const void* data, int64_t elements) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {static_cast<const T*>(data), aligned ? elements / kPerSlot<T> : 0};
}

template <class T, class Launcher>
void run_channel_affine(Launcher& launcher, const Device& device, const AffineForwardCall& call) {
  const AffinePlan plan = plan_affine(device, call.layout, sizeof(T), false);
  const AffineForwardArguments<T> arguments{
      plan,
      source_of<T>(call.x, plan.elements),
      source_of<T>(call.residual, plan.elements),
      call.parameters,
      call.relu,
      static_cast<T*>(call.out),
      static_cast<unsigned char*>(call.bits)};
  if (plan.one_channel) {
    launcher.run(call.residual == nullptr ? &channel_affine<T, true, false>
                                          : &channel_affine<T, true, true>,
                 plan.grid, arguments);
  } else {
    launcher.run(call.residual == nullptr ? &channel_affine<T, false, false>
                                          : &channel_affine<T, false, true>,
                 plan.grid, arguments);
  }
}

template <class T, class Launcher>
void run_channel_affine_gradient(Launcher& launcher, const Device& device,
                                 const AffineBackwardCall& call) {
  using A = ComputeType<T>;
  const bool sums = call.grad_weight.data != nullptr || call.grad_bias.data != nullptr;
  const AffinePlan plan = plan_affine(device, call.layout, sizeof(T), sums);
  A* partials = static_cast<A*>(call.workspace);
  const AffineBackwardArguments<T> arguments{
      plan,
      source_of<T>(call.grad_out, plan.elements),
      source_of<T>(call.x, plan.elements),
      call.parameters,
      !call.relu             ? Passing::kAll
      : call.bits != nullptr ? Passing::kByBits
                             : Passing::kByX,
      static_cast<const unsigned char*>(call.bits),
      static_cast<T*>(call.grad_x),
      static_cast<T*>(call.grad_residual),
      partials};
  if (plan.one_channel) {
    launcher.run(sums ? &channel_affine_gradient<T, true, true>
                      : &channel_affine_gradient<T, true, false>,
                 plan.grid, arguments);
  } else {
    launcher.run(sums ? &channel_affine_gradient<T, false, true>
                      : &channel_affine_gradient<T, false, false>,
                 plan.grid, arguments);
  }
  if (!sums) return;
  const ChannelTerms terms = channel_terms(plan, kPerSlot<T>);
  int per_block = 0;
  const Grid grid = totals_grid(2 * plan.channels.by, terms.count, per_block);
  launcher.run(&channel_affine_totals<T>, grid, plan, terms, per_block,
               static_cast<const A*>(partials), call.parameters, call.grad_weight, call.grad_bias);
}

}  // namespace ueo_fast::cuda
