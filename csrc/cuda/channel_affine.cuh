// out = relu?(x scale + shift (+ residual)) and its gradients, with a scale and a shift per channel
// that each thread computes from the parameters, for dense tensors of any layout: one read of each
// input, one write of each output. docs/kernels.md, "Affine kernels".
#pragma once

#include "channel_affine_totals.cuh"

namespace ueo_fast::cuda {

// Values of three kinds and two sums for each of 8 elements: 40 numbers, for which 64 registers are
// too few. 128 halve the threads, so a multiprocessor has 32 KiB in flight, which still covers memory's
// latency on an H100.
template <class T, bool kOneChannel, bool kSums>
inline constexpr bool kIsWide = sizeof(T) == 8 || (kSums && kNumbers<T, kOneChannel> == 8);
template <bool kWide>
inline constexpr int kAffineResident =
    65536 / (tuning::kAffineThreads * (kWide ? kMaxRegistersWide : kMaxRegisters));

template <class T>
struct AffineForwardArguments {
  AffinePlan plan;
  Source<T> x;
  Source<T> residual;
  ChannelParameters parameters;
  bool relu;
  T* out;
  unsigned char* bits;  // null without residual or relu
};

template <class T, bool kOneChannel, bool kResidual>
UEO_FAST_KERNEL
__launch_bounds__(tuning::kAffineThreads, (kAffineResident<kIsWide<T, kOneChannel, false>>))
    channel_affine(AffineForwardArguments<T> args) {
  using A = ComputeType<T>;
  constexpr int kOwn = kNumbers<T, kOneChannel>;
  // With 16 numbers in registers, two slots of two tensors do not fit.
  constexpr int kBatch = kOwn == 8 && kResidual ? 1 : tuning::kAffineBatch;
  const AffinePlan& plan = args.plan;
  SlotWalk<T> walk(plan);
  const int64_t stride = SlotWalk<T>::stride(plan);
  Numbers<A, kOwn> scale;
  Numbers<A, kOwn> shift;
  if (walk.slot < walk.end) {
    const int64_t first = walk.in_period * kPerSlot<T>;
    const auto keep = [&](int k, const Modulation<A>& numbers) {
      scale[k] = numbers.scale;
      shift[k] = numbers.shift;
    };
    for_each_element<T, kOwn>(plan, first, args.parameters, keep);
  }
#pragma unroll 1
  for (int left = plan.steps; left > 0; left -= kBatch) {
    Slot<T> x[kBatch] = {};
    Slot<T> residual[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t slot = walk.slot + b * stride;
      if (slot >= walk.end) continue;
      x[b] = args.x.load(slot, plan.elements);
      if constexpr (kResidual) residual[b] = args.residual.load(slot, plan.elements);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t slot = walk.slot + b * stride;
      const bool present = slot < walk.end;
      unsigned passed = 0;
      Slot<T> out;
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        A y = multiply_add(to_compute(x[b].x[k]), scale[k], shift[k]);
        if constexpr (kResidual) y += to_compute(residual[b].x[k]);
        if (args.relu && y <= 0) y = 0;
        out.x[k] = to_storage<T>(y);
        if constexpr (kResidual) {
          const bool within = slot * kPerSlot<T> + k < plan.elements;
          passed |= (within && is_passed(to_compute(out.x[k])) ? 1u : 0u) << k;
        }
      }
      if (present) store(args.out, slot, plan.elements, out);
      if constexpr (kResidual) {
        if (args.bits != nullptr) store_bits<T>(args.bits, slot, present, passed);
      }
    }
    walk.slot += kBatch * stride;
  }
}

enum class Passing { kAll, kByBits, kByX };

template <class T>
struct AffineBackwardArguments {
  using A = ComputeType<T>;
  AffinePlan plan;
  Source<T> grad_out;
  Source<T> x;
  ChannelParameters parameters;
  Passing passing;
  const unsigned char* bits;
  T* grad_x;         // each null if it is not needed
  T* grad_residual;
  A* partials;       // (blocks, 2, segments)
};

// g = grad_out where it is passed: grad_residual = g, grad_x = g scale, sums of g and g (x -
// mean).
template <class T, bool kOneChannel, bool kSums>
UEO_FAST_KERNEL
__launch_bounds__(tuning::kAffineThreads, (kAffineResident<kIsWide<T, kOneChannel, kSums>>))
    channel_affine_gradient(AffineBackwardArguments<T> args) {
  using A = ComputeType<T>;
  constexpr int kOwn = kNumbers<T, kOneChannel>;
  const AffinePlan& plan = args.plan;
  SlotWalk<T> walk(plan);
  const int64_t stride = SlotWalk<T>::stride(plan);
  Numbers<A, kOwn> scale;
  Numbers<A, kOwn> shift;
  Numbers<A, kOwn> mean;
  if (walk.slot < walk.end) {
    const int64_t first = walk.in_period * kPerSlot<T>;
    const auto keep = [&](int k, const Modulation<A>& numbers) {
      scale[k] = numbers.scale;
      shift[k] = numbers.shift;
      if constexpr (kSums) mean[k] = numbers.mean;
    };
    for_each_element<T, kOwn>(plan, first, args.parameters, keep);
  }
  Numbers<A, kOwn> sums[2];
  const bool reads_x = kSums || args.passing == Passing::kByX;
  constexpr int kBatch = tuning::kAffineBatch;
#pragma unroll 1
  for (int left = plan.steps; left > 0; left -= kBatch) {
    Slot<T> grad[kBatch];
    Slot<T> x[kBatch];
    unsigned passed[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      grad[b] = {};
      x[b] = {};
      passed[b] = ~0u;
      const int64_t slot = walk.slot + b * stride;
      if (slot >= walk.end) continue;
      grad[b] = args.grad_out.load(slot, plan.elements);
      if (reads_x) x[b] = args.x.load(slot, plan.elements);
      if (args.passing == Passing::kByBits) passed[b] = load_bits<T>(args.bits, slot);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t slot = walk.slot + b * stride;
      if (slot >= walk.end) continue;
      if (args.passing == Passing::kByX) {
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) {
          const A y = multiply_add(to_compute(x[b].x[k]), scale[k], shift[k]);
          if (!is_passed(to_compute(to_storage<T>(y)))) passed[b] &= ~(1u << k);
        }
      }
      // Elements beyond the end have g = 0 and x = 0, and add nothing: mean is finite or its
      // channel's sum NaN anyway.
      Numbers<A, kOwn> own[2];
      Slot<T> grad_x;
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        if ((passed[b] >> k & 1) == 0) grad[b].x[k] = to_storage<T>(0.f);
        const A g = to_compute(grad[b].x[k]);
        grad_x.x[k] = to_storage<T>(g * scale[k]);
        if constexpr (kSums) {
          own[0][k] += g;
          own[1][k] = multiply_add(g, to_compute(x[b].x[k]) - mean[k], own[1][k]);
        }
      }
      if constexpr (kSums) {
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          sums[0][k] += own[0][k];
          sums[1][k] += own[1][k];
        }
      }
      if (args.grad_residual != nullptr) store(args.grad_residual, slot, plan.elements, grad[b]);
      if (args.grad_x != nullptr) store(args.grad_x, slot, plan.elements, grad_x);
    }
    walk.slot += kBatch * stride;
  }
  if constexpr (kSums) {
    store_partial_sums<T, kOneChannel>(plan, reinterpret_cast<A*>(shared_memory()), sums,
                                       args.partials);
  }
}

}  // namespace ueo_fast::cuda
