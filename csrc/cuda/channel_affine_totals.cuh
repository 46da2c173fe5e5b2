// Sums over channels in two levels: the threads of a block add partial sums, and these are added to
// totals in double. Every order is fixed: the same input gives the same bits.
#pragma once

#include "channel_affine_slots.cuh"

namespace ueo_fast::cuda {

// Adds what the threads of the block have summed up, by runs of one channel: (segments) numbers for
// each of the two sums. `numbers` is shared memory.
template <class T, bool kOneChannel, class A>
__device__ __forceinline__ void store_partial_sums(
    const AffinePlan& plan, A* numbers,
    const Numbers<A, kNumbers<T, kOneChannel>> (&sums)[2], A* partials) {
  constexpr int kOwn = kNumbers<T, kOneChannel>;
  constexpr int kUnit = kOneChannel ? kPerSlot<T> : 1;  // elements that share a number
  const int rank = static_cast<int>(threadIdx.x);
  const int64_t tile = SlotWalk<T>::tile(plan);
  const int line = plan.width * kOwn;
  const int all = plan.lines * line;
  if (rank < plan.lines * plan.width) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) numbers[s * all + rank * kOwn + k] = sums[s].x[k];
    }
  }
  __syncthreads();

  LaneTeam lanes{rank % plan.segment_lanes, plan.segment_lanes};
  const int teams = static_cast<int>(blockDim.x) / lanes.size;
  const int64_t begin = tile * plan.width * kPerSlot<T>;
  const int64_t left = (plan.period - tile * plan.width) * kPerSlot<T>;
  const int64_t size = plan.width * kPerSlot<T>;
  const int64_t end = begin + (left < size ? left : size);
  const int64_t first_run = quotient(begin, plan.inner);
  A* const out = partials + int64_t{blockIdx.x} * 2 * plan.segments;
  for (int round = 0; round < plan.segments; round += teams) {
    const int segment = round + rank / lanes.size;
    int64_t from = (first_run + segment) * plan.inner.by;
    int64_t to = from + plan.inner.by;
    from = from < begin ? begin : from;
    to = to > end ? end : to;
    const int count = from < to ? static_cast<int>(to - from) / kUnit : 0;
    const int offset = static_cast<int>(from - begin) / kUnit;
    double total[2] = {0, 0};
    for (int n = lanes.rank; n < count * plan.lines; n += lanes.size) {
      const int of_line = n / count;
      const int at = of_line * line + offset + (n - of_line * count);
      total[0] += numbers[at];
      total[1] += numbers[at + all];
    }
    lanes.reduce(Sum{}, total);
    if (lanes.rank == 0 && segment < plan.segments) {
      out[segment] = static_cast<A>(total[0]);
      out[plan.segments + segment] = static_cast<A>(total[1]);
    }
  }
}

// store(column, sum over n < count of terms(column, n)). Neighbouring threads have neighbouring
// columns, `per_block` of them (a power of two); the others share the terms.
template <class Terms, class Store>
__device__ __forceinline__ void add_terms(int64_t columns, int count, int per_block, Terms&& terms,
                                          Store&& store) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int rank = static_cast<int>(threadIdx.x);
  const int64_t column = int64_t{blockIdx.x} * per_block + rank % per_block;
  const int groups = static_cast<int>(blockDim.x) / per_block;
  double sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int n = rank / per_block; n < count; n += groups) sum += terms(column, n);
  }
  scratch[rank] = sum;
  for (int half = static_cast<int>(blockDim.x) / 2; half >= per_block; half /= 2) {
    __syncthreads();
    if (rank < half) scratch[rank] += scratch[rank + half];
  }
  if (rank < per_block && column < columns) store(column, scratch[rank]);
}

// Where the partial sums of a channel are.
struct ChannelTerms {
  int replicas;  // runs of the channel in a period
  int tiles;     // that a run may touch
  int count;     // in all
};

inline ChannelTerms channel_terms(const AffinePlan& plan, int per_slot) {
  const int64_t tile = plan.tile_elements.by;
  const int64_t replicas = divide_up(plan.period * per_slot, plan.channels.by * plan.inner.by);
  const int64_t tiles = std::min<int64_t>(plan.tiles, divide_up(plan.inner.by - 1, tile) + 1);
  return {static_cast<int>(replicas), static_cast<int>(tiles),
          static_cast<int>(plan.chunks * replicas * tiles)};
}

template <class T>
__device__ __forceinline__ void store_number(const ChannelNumbers<void*>& numbers, int channel,
                                             double value) {
  using A = ComputeType<T>;
  if (numbers.data == nullptr) return;
  if constexpr (!std::is_same_v<T, A>) {
    if (numbers.stored) {
      static_cast<T*>(numbers.data)[channel] = to_storage<T>(static_cast<A>(value));
      return;
    }
  }
  static_cast<A*>(numbers.data)[channel] = static_cast<A>(value);
}

// The gradients of the bias, from the first sum, and of the weight, from the second.
template <class T>
UEO_FAST_KERNEL __launch_bounds__(tuning::kTotalsThreads)
    channel_affine_totals(AffinePlan plan, ChannelTerms terms, int per_block,
                          const ComputeType<T>* partials, ChannelParameters parameters,
                          ChannelNumbers<void*> grad_weight, ChannelNumbers<void*> grad_bias) {
  const int64_t period = plan.period * kPerSlot<T>;
  const auto term = [&](int64_t column, int n) {
    const int sum = column >= plan.channels.by ? 1 : 0;
    const int rest = n / terms.tiles;
    const int chunk = rest / terms.replicas;
    const int64_t run =
        (rest - chunk * terms.replicas - sum) * plan.channels.by + column;
    const int64_t begin = run * plan.inner.by;
    const int64_t end = begin + plan.inner.by < period ? begin + plan.inner.by : period;
    const int64_t tile = quotient(begin, plan.tile_elements) + (n - rest * terms.tiles);
    const int64_t tile_begin = tile * plan.tile_elements.by;
    if (tile_begin >= end) return 0.0;
    const int64_t segment = run - quotient(tile_begin, plan.inner);
    const int64_t block = int64_t{chunk} * plan.tiles + tile;
    return static_cast<double>(partials[(block * 2 + sum) * plan.segments + segment]);
  };
  const auto store = [&](int64_t column, double sum) {
    const int channels = static_cast<int>(plan.channels.by);
    const int at = static_cast<int>(column);
    if (at < channels) return store_number<T>(grad_bias, at, sum);
    const int channel = at - channels;
    store_number<T>(grad_weight, channel, sum * reciprocal_deviation<T>(parameters, channel));
  };
  add_terms(2 * plan.channels.by, terms.count, per_block, term, store);
}

}  // namespace ueo_fast::cuda
