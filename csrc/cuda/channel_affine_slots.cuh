// The memory of dense tensors by slots of 16 bytes, the channels of a slot's elements
// (affine_launch.h, AffinePlan), and the numbers of a channel.
#pragma once

#include <cmath>

#include "channel_affine.h"
#include "rows.cuh"
#include "team.cuh"

namespace ueo_fast::cuda {

// Rounds once; the same in forward and where backward recomputes what forward stored.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// Off by up to two units in the last place, as PyTorch's on a GPU: correct rounding took 25 more
// instructions for each of a thread's channels.
__device__ __forceinline__ float reciprocal_root_near(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root_near(double x) { return rsqrt(x); }

// Whether relu passes the gradient of a stored result; that of NaN passes, as in PyTorch.
template <class A>
__device__ __forceinline__ bool is_passed(A stored) {
  return !(stored <= 0);
}

// A slot element by element, in a loop that is not unrolled: it runs only for unaligned tensors and
// for the last slot, and must not cost the others registers.
template <class T>
struct SlotBits {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  static constexpr int kWidth = 8 * static_cast<int>(sizeof(T)) % 64;
  uint64_t halves[2] = {0, 0};

  // Makes room for a new element 0.
  __device__ __forceinline__ void push(Bits element) {
    halves[1] = kWidth == 0 ? halves[0] : halves[1] << kWidth | halves[0] >> (64 - kWidth) % 64;
    halves[0] = (kWidth == 0 ? 0 : halves[0] << kWidth) | element;
  }
  // Takes element 0 away.
  __device__ __forceinline__ Bits pop() {
    const Bits element = static_cast<Bits>(halves[0]);
    halves[0] = kWidth == 0 ? halves[1] : halves[0] >> kWidth | halves[1] << (64 - kWidth) % 64;
    halves[1] >>= kWidth;
    return element;
  }
};

// What a kernel reads: slots before `whole` in one piece (none, if the tensor is not aligned).
template <class T>
struct Source {
  const T* data;
  int64_t whole;

  // Elements beyond the end are 0.
  __device__ __forceinline__ Slot<T> load(int64_t slot, int64_t elements) const {
    Slot<T> value;
    const T* from = data + slot * kPerSlot<T>;
    if (slot < whole) {
      load_whole(value, from);
      return value;
    }
    using Bits = typename SlotBits<T>::Bits;
    SlotBits<T> bits;
#pragma unroll 1
    for (int k = kPerSlot<T> - 1; k >= 0; --k) {
      const bool within = slot * kPerSlot<T> + k < elements;
      bits.push(within ? reinterpret_cast<const Bits*>(from)[k] : Bits(0));
    }
    memcpy(&value, bits.halves, 16);
    return value;
  }
};

// What a kernel writes is aligned; only the last slot may not be whole.
template <class T>
__device__ __forceinline__ void store(T* data, int64_t slot, int64_t elements,
                                      const Slot<T>& value) {
  T* to = data + slot * kPerSlot<T>;
  const int64_t left = elements - slot * kPerSlot<T>;
  if (left >= kPerSlot<T>) {
    store_whole(to, value);
    return;
  }
  SlotBits<T> bits;
  memcpy(bits.halves, &value, 16);
#pragma unroll 1
  for (int k = 0; k < static_cast<int>(left); ++k) {
    reinterpret_cast<typename SlotBits<T>::Bits*>(to)[k] = bits.pop();
  }
}

// Where a thread is: its slot of the period, and in memory from step to step.
template <class T>
struct SlotWalk {
  int64_t in_period;
  int64_t slot;
  int64_t end;  // of the chunk or the tensor; before `slot` where the thread has nothing to do

  __device__ __forceinline__ explicit SlotWalk(const AffinePlan& plan) {
    const int rank = static_cast<int>(threadIdx.x);
    const int line = rank / plan.width;
    const int64_t chunk = static_cast<int>(blockIdx.x) / plan.tiles;
    in_period = int64_t{tile(plan)} * plan.width + (rank - line * plan.width);
    slot = (chunk * plan.steps * plan.lines + line) * plan.period + in_period;
    const int64_t slots = (plan.elements + kPerSlot<T> - 1) / kPerSlot<T>;
    const int64_t chunk_end = (chunk + 1) * plan.steps * plan.lines * plan.period;
    end = line >= plan.lines || in_period >= plan.period ? 0
          : slots < chunk_end                            ? slots
                                                         : chunk_end;
  }

  __device__ __forceinline__ static int tile(const AffinePlan& plan) {
    return static_cast<int>(blockIdx.x) % plan.tiles;
  }
  __device__ __forceinline__ static int64_t stride(const AffinePlan& plan) {
    return plan.lines * plan.period;
  }
};

// a / b for 0 <= a < 2^52: in 32 bits where they are enough, else by the inverse, which is at most
// one off.
__device__ __forceinline__ int64_t quotient(int64_t a, const Divisor& b) {
  if (((a | b.by) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b.by);
  const int64_t near = static_cast<int64_t>(static_cast<double>(a) * b.inverse);
  const int64_t rest = a - near * b.by;
  return rest < 0 ? near - 1 : rest >= b.by ? near + 1 : near;
}

template <class T>
__device__ __forceinline__ ComputeType<T> number_of(const ChannelNumbers<const void*>& numbers,
                                                    int channel, ComputeType<T> otherwise) {
  using A = ComputeType<T>;
  if (numbers.data == nullptr) return otherwise;
  if constexpr (!std::is_same_v<T, A>) {
    if (numbers.stored) return to_compute(static_cast<const T*>(numbers.data)[channel]);
  }
  return static_cast<const A*>(numbers.data)[channel];
}

// 1 / sqrt(var + eps), or 1 without a variance.
template <class T>
__device__ __forceinline__ ComputeType<T> reciprocal_deviation(
    const ChannelParameters& parameters, int channel) {
  using A = ComputeType<T>;
  if (parameters.var.data == nullptr) return 1;
  const A var = number_of<T>(parameters.var, channel, 0);
  return reciprocal_root_near(var + static_cast<A>(parameters.eps));
}

// A channel's scale and shift. The compiler cannot fuse any two of the steps, so that backward
// computes forward's bits.
template <class A>
struct Modulation {
  A scale;
  A shift;
  A mean;
};

template <class T>
__device__ __forceinline__ Modulation<ComputeType<T>> modulation(
    const ChannelParameters& parameters, int channel) {
  Modulation<ComputeType<T>> numbers;
  numbers.mean = number_of<T>(parameters.mean, channel, 0);
  numbers.scale =
      number_of<T>(parameters.weight, channel, 1) * reciprocal_deviation<T>(parameters, channel);
  numbers.shift = number_of<T>(parameters.bias, channel, 0);
  // Without a mean, an infinite scale must not be multiplied by 0.
  if (parameters.mean.data != nullptr) {
    numbers.shift = multiply_add(-numbers.mean, numbers.scale, numbers.shift);
  }
  return numbers;
}

// f(k, numbers), with those of its channel, for the n elements of the period from `first` on.
template <class T, int n, class F>
__device__ __forceinline__ void for_each_element(const AffinePlan& plan, int64_t first,
                                                 const ChannelParameters& parameters, F&& f) {
  const int64_t run = quotient(first, plan.inner);
  const int channels = static_cast<int>(plan.channels.by);
  int channel = static_cast<int>(run - quotient(run, plan.channels) * channels);
  const auto next_channel = [&] { channel = channel + 1 == channels ? 0 : channel + 1; };
  // Elements until the next channel; no slot has more than 8.
  const int64_t until = plan.inner.by - (first - run * plan.inner.by);
  int left = until < 8 ? static_cast<int>(until) : 8;
  const Modulation<ComputeType<T>> here = modulation<T>(parameters, channel);
  if constexpr (n == 1) return f(0, here);
  if (plan.inner.by >= n) {  // at most two channels: no third set of numbers is looked up
    next_channel();
    const Modulation<ComputeType<T>> next = modulation<T>(parameters, channel);
#pragma unroll
    for (int k = 0; k < n; ++k) f(k, k < left ? here : next);
    return;
  }
  const int length = static_cast<int>(plan.inner.by);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    f(k, k == 0 ? here : modulation<T>(parameters, channel));
    if (--left == 0) {
      left = length;
      next_channel();
    }
  }
}

// One number per element of the thread's slot, or a single one if they share a channel.
template <class T, bool kOneChannel>
inline constexpr int kNumbers = kOneChannel ? 1 : kPerSlot<T>;

template <class A, int n>
struct Numbers {
  A x[n] = {};
  __device__ __forceinline__ A& operator[](int k) { return x[n == 1 ? 0 : k]; }
  __device__ __forceinline__ A operator[](int k) const { return x[n == 1 ? 0 : k]; }
};

// The thread's bits, one per element of its slot, to the byte that neighbouring lanes share. Every
// lane of the warp takes part. Periods and tiles start at whole bytes.
template <class T>
__device__ __forceinline__ void store_bits(unsigned char* bits, int64_t slot, bool present,
                                           unsigned mine) {
  constexpr unsigned kLanes = 8 / kPerSlot<T>;
  const unsigned rank = threadIdx.x;
#pragma unroll
  for (unsigned offset = 1; offset < kLanes; offset *= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, mine, static_cast<int>(offset));
    const unsigned width = offset * kPerSlot<T>;
    mine = (rank & offset) != 0 ? other | mine << width : mine | other << width;
  }
  if (present && rank % kLanes == 0) {
    bits[slot / kLanes] = static_cast<unsigned char>(mine);
  }
}

template <class T>
__device__ __forceinline__ unsigned load_bits(const unsigned char* bits, int64_t slot) {
  constexpr int kSlots = 8 / kPerSlot<T>;  // of a byte
  return bits[slot / kSlots] >> (slot % kSlots * kPerSlot<T>);
}

}  // namespace ueo_fast::cuda
