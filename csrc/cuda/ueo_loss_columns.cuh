// What the loss keeps per column: the sums of step 5 and the log q of step 8, laid out by slots like
// the rows, so that a thread meets the same columns in every row.
#pragma once

#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

// A number of the compute type for each element of `slots` slots. Sixteen bytes of them are adjacent,
// then comes the next slot: neighbouring threads read neighbouring memory, without bank conflicts.
template <class T>
struct ColumnSlots {
  using A = ComputeType<T>;
  static constexpr int kPiece = kPerSlot<A>;
  static constexpr int kPieces = kPerSlot<T> / kPiece;

  int slots;

  __device__ explicit ColumnSlots(int slots_) : slots(slots_) {}

  __device__ __forceinline__ int64_t size() const { return int64_t{slots} * kPerSlot<T>; }

  __device__ __forceinline__ int64_t offset(int slot, int element) const {
    return int64_t{element / kPiece * slots + slot} * kPiece + element % kPiece;
  }
  __device__ __forceinline__ Slot<A>* piece(A* numbers, int slot, int i) const {
    return reinterpret_cast<Slot<A>*>(numbers) + (i * slots + slot);
  }

  template <class Team>
  __device__ __forceinline__ void clear(const Team& team, A* numbers) const {
    for (int slot = team.rank; slot < slots; slot += team.size) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) *piece(numbers, slot, i) = Slot<A>{};
    }
  }

  // numbers[element] += weight * e[element], for the elements of a slot.
  __device__ __forceinline__ void add(A* numbers, int slot, A weight,
                                      const A (&e)[kPerSlot<T>]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Slot<A> sum = *piece(numbers, slot, i);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) sum.x[k] += weight * e[i * kPiece + k];
      *piece(numbers, slot, i) = sum;
    }
  }

  __device__ __forceinline__ void load(const A* numbers, int slot, A (&out)[kPerSlot<T>]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Slot<A> part = *piece(const_cast<A*>(numbers), slot, i);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) out[i * kPiece + k] = part.x[k];
    }
  }

  // Adds `sets` sets of numbers, in their order, and writes them by column.
  __device__ __forceinline__ void store_total(const BlockTeam& block, const Frame<T>& frame,
                                              const A* numbers, int sets, A* by_column) const {
    for (int column = block.rank; column < frame.columns; column += block.size) {
      const int position = column + frame.shift;
      const A* number = numbers + offset(position / kPerSlot<T>, position % kPerSlot<T>);
      double total = 0;
      for (int set = 0; set < sets; ++set) total += number[set * size()];
      by_column[column] = static_cast<A>(total);
    }
  }
  // The same for the marginal kernel, which reads whole pieces: zeros behind the last column.
  __device__ __forceinline__ void store_partial_sum(const BlockTeam& block, const Frame<T>& frame,
                                                    const A* numbers, int sets,
                                                    A* by_column) const {
    store_total(block, frame, numbers, sets, by_column);
    const int missing = -frame.columns & (tuning::kPieceColumns - 1);
    if (block.rank < missing) by_column[frame.columns + block.rank] = A(0);
  }
};

// Column sums in shared memory, or in global memory where shared has no room. `f` is compiled for each
// of them: through one pointer for both, every access would have to find out which it is.
template <class A, class F>
__device__ __forceinline__ void with_sums(A* shared, A* global, F&& f) {
  if (global == nullptr) {
    f(shared);
  } else {
    f(global);
  }
}

// Step 6's log q of each column (log_marginal): from shared memory, where there is room for it.
template <class T>
struct LogMarginal {
  using A = ComputeType<T>;
  A* shared;          // or null
  const A* marginal;  // (columns,)
  ColumnSlots<T> columns;
  A eps;

  __device__ __forceinline__ void stage(const BlockTeam& block, const Frame<T>& frame) const {
    for (int position = block.rank; position < columns.size(); position += block.size) {
      const int slot = position / kPerSlot<T>;
      const int element = position % kPerSlot<T>;
      const int column = frame.column(slot, element);
      shared[columns.offset(slot, element)] =
          frame.has(column) ? log_marginal(marginal[column], eps) : A(0);
    }
  }

  __device__ __forceinline__ void load(const Frame<T>& frame, int slot,
                                       A (&out)[kPerSlot<T>]) const {
    if (shared != nullptr) {
      columns.load(shared, slot, out);
      return;
    }
#pragma unroll
    for (int k = 0; k < kPerSlot<T>; ++k) {
      const int column = frame.column(slot, k);
      out[k] = frame.has(column) ? log_marginal(marginal[column], eps) : A(0);
    }
  }
};

// S_i = sum_k p_ik log q_k.
template <class A, class Team, class Source, class T>
__device__ __forceinline__ A mean_log_marginal(Team& team, const Source& source, const Row<T>& row,
                                               const GradientRow<A>& gradient,
                                               const LogMarginal<T>& log_q) {
  A sum[1] = {0};
  source.for_each(team, row, [&](int slot, const Slot<T>& z) {
    A logs[kPerSlot<T>];
    log_q.load(row.frame, slot, logs);
#pragma unroll
    for (int k = 0; k < kPerSlot<T>; ++k) {
      sum[0] += exp2_of(exponent(to_compute(z.x[k]), gradient.max)) * logs[k];
    }
  });
  team.reduce(Sum{}, sum);
  return sum[0] * gradient.inverse_sum;
}

// The elements of the slot that belong to the row; as a whole only if `row`, where they are written,
// has the offset of `frame` from a 16-byte boundary.
template <class T>
__device__ __forceinline__ void store_slot(const Frame<T>& frame, int slot, const Slot<T>& value,
                                           T* row, bool aligned, bool stream) {
  T* address = row + frame.column(slot, 0);
  if (aligned && frame.is_whole(slot)) {
    store_whole(address, value, stream);
    return;
  }
#pragma unroll
  for (int k = 0; k < kPerSlot<T>; ++k) {
    if (frame.has(frame.column(slot, k))) address[k] = value.x[k];
  }
}

// Step 8 of one slot.
template <class A, class T>
__device__ __forceinline__ void store_gradient(const Frame<T>& frame, int slot, const Slot<T>& z,
                                               const GradientRow<A>& gradient,
                                               const LogMarginal<T>& log_q, T* grad_row,
                                               bool stream) {
  A logs[kPerSlot<T>];
  log_q.load(frame, slot, logs);
  Slot<T> out;
#pragma unroll
  for (int k = 0; k < kPerSlot<T>; ++k) {
    out.x[k] = to_storage<T>(gradient(to_compute(z.x[k]), logs[k], log_q.eps));
  }
  store_slot(frame, slot, out, grad_row,
             reinterpret_cast<uintptr_t>(grad_row - frame.shift) % 16 == 0, stream);
}

}  // namespace ueo_fast::cuda
