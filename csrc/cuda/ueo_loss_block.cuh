// The loss for rows that a whole block shares, without eps, confidence scale and given weights:
// registers hold a row, shared memory the next one, which arrives in the meantime, and a number per
// column. Steps are those of docs/math.md.
#pragma once

#include "row_loop.cuh"
#include "ueo_loss_any.cuh"
#include "ueo_loss_columns.cuh"
#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

// Rows that arrive in shared memory and are taken to registers; a thread has the same slots of all of
// them, as in CachedRow, and waits only for its own.
template <class T, int kSlots>
struct ArrivingRows {
  static constexpr int kElements = kSlots * kPerSlot<T>;

  const Matrix<T>& matrix;
  Slot<T>* cache;      // the thread's first slot
  const Frame<T>& frame;
  int rank;            // of that slot
  int hop;             // from one of its slots to the next
  int inside;          // slots of the thread that belong to a row
  Slot<T> slot[kSlots];

  __device__ __forceinline__ ArrivingRows(const Matrix<T>& matrix_, Slot<T>* cache_,
                                          const Frame<T>& frame_, const BlockTeam& block)
      : matrix(matrix_),
        cache(cache_ + block.rank),
        frame(frame_),
        rank(block.rank),
        hop(block.size),
        inside(0) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      inside += rank + i * hop < frame.slots ? 1 : 0;
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) slot[i].x[k] = minus_infinity<T>();
    }
  }

  // Starts to bring row `index`, if there is one.
  __device__ __forceinline__ void fetch(int64_t index) const {
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(matrix.rows)) return;
    const T* from = matrix.data + (index * matrix.row_stride + frame.column(rank, 0));
    if (matrix.sticks_out) {
      fetch_readable(from);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i < inside) copy_async(&cache[i * hop], from + i * hop * kPerSlot<T>);
    }
  }
  // The same where the matrix's first or last slot may extend outside the allocation.
  __device__ __forceinline__ void fetch_readable(const T* from) const {
#pragma unroll 1
    for (int i = 0; i < inside; ++i) {
      const T* address = from + i * hop * kPerSlot<T>;
      if (matrix.is_readable(address)) {
        copy_async(&cache[i * hop], address);
      } else {
#pragma unroll 1
        for (int k = 0; k < kPerSlot<T>; ++k) {
          if (frame.has(frame.column(rank + i * hop, k))) cache[i * hop].x[k] = address[k];
        }
      }
    }
  }

  // Takes the row that was fetched, and lets the next one take its place.
  __device__ __forceinline__ void take(int64_t next) {
    copies_wait();
    if (rank == 0) mask_elements(cache[0], 0, frame.shift);
    const int last = rank + (inside - 1) * hop;
    if (last == frame.slots - 1) {
      mask_elements(cache[(inside - 1) * hop], frame.columns - frame.column(last, 0), kPerSlot<T>);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i >= inside) continue;
      load_whole(slot[i], &cache[i * hop]);
    }
    fetch(next);
  }
  // Elements of neighbours become masked classes.
  __device__ __forceinline__ static void mask_elements(Slot<T>& shared, int from, int to) {
#pragma unroll 1
    for (int k = from; k < to; ++k) shared.x[k] = minus_infinity<T>();
  }

  __device__ __forceinline__ float element(int n) const {
    return to_compute(slot[n / kPerSlot<T>].x[n % kPerSlot<T>]);
  }
};

// First read of the logits, as ueo_statistics: plain, so that v / s = 1 and what is added to the column
// sums is known before the row's own sums are.
template <class T, int kSlots>
UEO_FAST_KERNEL __launch_bounds__(tuning::kSharedRowThreads, 1)
    ueo_statistics_block(StatisticsArguments<T> args) {
  BlockTeam block = this_block();
  const Frame<T> frame = block_frame(args.logits);
  const ColumnSlots<T> columns(args.loop.slots);
  // Of w, v, w H: in shared memory, as only one thread adds to them.
  double* totals = reinterpret_cast<double*>(shared_memory() + kScratchBytes);
  float* sums = reinterpret_cast<float*>(shared_memory() + kScratchBytes + kBlockTotalsBytes);
  ArrivingRows<T, kSlots> row(args.logits, reinterpret_cast<Slot<T>*>(sums + columns.size()), frame,
                              block);
  row.fetch(blockIdx.x);
  columns.clear(block, sums);
  if (block.rank == 0) totals[0] = totals[1] = totals[2] = 0;
  if (blockIdx.x == 0 && block.rank == 0) *args.finished = 0;

  const int steps = static_cast<int>(args.loop.steps);
  int64_t index = blockIdx.x;
  for (int step = 0; step < steps; ++step, index += gridDim.x) {
    const bool present = index < args.logits.rows;
    row.take(index + gridDim.x);
    float top[1] = {row.element(0)};
#pragma unroll
    for (int n = 1; n < row.kElements; ++n) top[0] = larger(top[0], row.element(n));
    block.reduce(Larger{}, top);
    const float reference = top[0] == -INFINITY ? 0.0f : top[0];
    float over_row[2] = {0, 0};  // sums of e and e t
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      float e[kPerSlot<T>];
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        const float t = exponent(row.element(i * kPerSlot<T> + k), reference);
        e[k] = exp2_of(t);
        over_row[0] += e[k];
        over_row[1] += e[k] * t;
      }
      if (present && i < row.inside) columns.add(sums, block.rank + i * block.size, 1.0f, e);
    }
    block.reduce(Sum{}, over_row);
    if (present && block.rank == 0) {
      RowStatistics<float> stats = without_weights(top[0], over_row[0], over_row[1]);
      stats.marginal_weight = stats.sum;
      stats.confidence = 1 / stats.sum;
      stats.store(args.row_stats + index * kRowStats);
      totals[0] += stats.confidence;
      totals[1] += stats.marginal_weight;
      totals[2] += stats.confidence * row_entropy(stats);
    }
    const bool last = step + 1 == steps;
    if (last || (step + 1) % tuning::kRowsPerSum == 0) {
      const int64_t partial = blockIdx.x + int64_t{gridDim.x} * (step / tuning::kRowsPerSum);
      __syncthreads();
      columns.store_partial_sum(block, frame, sums, 1,
                                args.partial_sums + partial * args.column_stride);
      if (!last) {
        __syncthreads();
        columns.clear(block, sums);
      }
    }
  }
  if (block.rank == 0) {
    for (int i = 0; i < 3; ++i) args.block_sums[int64_t{blockIdx.x} * 3 + i] = totals[i];
  }
}

// Second read and only write, as ueo_gradient, without eps; e and b are computed twice, which takes fewer
// instructions than there is time for, where keeping both would take more registers than there are.
template <class T, int kSlots>
UEO_FAST_KERNEL __launch_bounds__(tuning::kSharedRowThreads, 1)
    ueo_gradient_block(GradientArguments<T> args) {
  BlockTeam block = this_block();
  const Frame<T> frame = block_frame(args.logits);
  const ColumnSlots<T> columns(args.loop.slots);
  float* shared = reinterpret_cast<float*>(shared_memory() + kScratchBytes);
  const LogMarginal<T> log_q{shared, args.marginal, columns, args.eps};
  ArrivingRows<T, kSlots> row(args.logits, reinterpret_cast<Slot<T>*>(shared + columns.size()),
                              frame, block);
  int64_t index = blockIdx.x + gridDim.x * (args.loop.steps - 1);
  row.fetch(index);
  log_q.stage(block, frame);
  __syncthreads();
  const GradientScale<float> scale = args.gradient_scale();

  for (; index >= 0; index -= gridDim.x) {
    const bool present = index < args.logits.rows;
    GradientRow<float> gradient(
        RowStatistics<float>::load(args.row_stats + (present ? index : 0) * kRowStats), scale);
    gradient.entropy_factor *= gradient.inverse_sum;
    gradient.marginal_factor *= gradient.inverse_sum;
    row.take(index - gridDim.x);
    // e and b of the elements of a slot.
    const auto compute = [&](int i, int at, float (&e)[kPerSlot<T>], float (&b)[kPerSlot<T>]) {
      float logs[kPerSlot<T>];
      log_q.columns.load(shared, at, logs);
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        const float t = exponent(row.element(i * kPerSlot<T> + k), gradient.max);
        e[k] = exp2_of(t);
        b[k] = gradient.entropy_factor * t + gradient.marginal_factor * logs[k];
      }
    };
    float mean[1] = {0};
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int at = block.rank + i * block.size;
      if (i >= row.inside) continue;
      float e[kPerSlot<T>], b[kPerSlot<T>];
      compute(i, at, e, b);
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) mean[0] += e[k] * b[k];
    }
    block.reduce(Sum{}, mean);
    mean[0] *= gradient.inverse_sum;
    if (!present) continue;
    T* grad_row = args.grad + index * args.logits.columns;
    // Rows of the gradient may start elsewhere in their slots than those of a strided batch.
    const bool aligned = reinterpret_cast<uintptr_t>(grad_row - frame.shift) % 16 == 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int at = block.rank + i * block.size;
      if (i >= row.inside) continue;
      float e[kPerSlot<T>], b[kPerSlot<T>];
      compute(i, at, e, b);
      Slot<T> out;
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) out.x[k] = to_storage<T>(e[k] * (b[k] - mean[0]));
      store_slot(frame, at, out, grad_row, aligned, args.stream);
    }
  }
}

}  // namespace ueo_fast::cuda
