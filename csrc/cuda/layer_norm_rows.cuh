// What layer_norm keeps of rows and of columns while it walks over them, by slots as the loss does
// (rows.cuh, ueo_loss_columns.cuh).
#pragma once

#include "channel_affine_slots.cuh"
#include "row_loop.cuh"
#include "ueo_loss_columns.cuh"

namespace ueo_fast::cuda {

// A row of a tensor that may start elsewhere in its slots than the row whose frame it is seen in;
// it is then read element by element.
template <class T>
struct NormCache {
  CachedRow<T> row_cache;
  bool aligned;

  __device__ __forceinline__ Slot<T> load(const Row<T>& row, int slot) const {
    if (aligned) return row.load(slot);
    Slot<T> value;
#pragma unroll
    for (int k = 0; k < kPerSlot<T>; ++k) {
      value.x[k] = row.frame.has(row.frame.column(slot, k)) ? row.address(slot)[k]
                                                            : to_storage<T>(0.f);
    }
    return value;
  }
  // Starts to bring a slot; to be waited for before it is used.
  __device__ __forceinline__ void fetch(const Row<T>& row, int slot) const {
    if (aligned) {
      row_cache.fetch(row, slot);
    } else if (slot < row_cache.cached) {
      row_cache.cache[slot] = load(row, slot);
    }
  }
  template <class Team>
  __device__ __forceinline__ void fetch_all(const Team& team, const Row<T>& row) const {
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) fetch(row, slot);
  }
  // Elements outside of the row are `outside`.
  template <class A>
  __device__ __forceinline__ void read(const Row<T>& row, int slot, A outside,
                                       A (&out)[kPerSlot<T>]) const {
    Slot<T> value;
    if (slot < row_cache.cached) {
      load_whole(value, &row_cache.cache[slot]);
    } else {
      value = load(row, slot);
    }
    const bool whole = row.frame.is_whole(slot);
#pragma unroll
    for (int k = 0; k < kPerSlot<T>; ++k) {
      out[k] = whole || row.frame.has(row.frame.column(slot, k)) ? to_compute(value.x[k]) : outside;
    }
  }
};

// A weight or bias by slots, staged in shared memory if there is room for it.
template <class T>
struct NormValues {
  using A = ComputeType<T>;
  A* shared;        // or null
  const A* values;  // (columns,) or null
  ColumnSlots<T> columns;
  A otherwise;

  __device__ __forceinline__ A of_column(const Frame<T>& frame, int column) const {
    return values != nullptr && frame.has(column) ? values[column] : otherwise;
  }
  __device__ __forceinline__ void stage(const BlockTeam& block, const Frame<T>& frame) const {
    if (shared == nullptr) return;
    for (int position = block.rank; position < columns.size(); position += block.size) {
      const int slot = position / kPerSlot<T>;
      const int element = position % kPerSlot<T>;
      shared[columns.offset(slot, element)] = of_column(frame, frame.column(slot, element));
    }
  }
  __device__ __forceinline__ void load(const Frame<T>& frame, int slot,
                                       A (&out)[kPerSlot<T>]) const {
    if (shared != nullptr) {
      columns.load(shared, slot, out);
      return;
    }
#pragma unroll
    for (int k = 0; k < kPerSlot<T>; ++k) out[k] = of_column(frame, frame.column(slot, k));
  }
};

// A slot of a row whose tensor is contiguous: in one piece where it is whole and aligned. store_slot
// (ueo_loss_columns.cuh) does the same, but compiles to other code here.
template <class T>
__device__ __forceinline__ void store_in_row(const Frame<T>& frame, int slot, const Slot<T>& value,
                                             T* row) {
  T* address = row + frame.column(slot, 0);
  if (frame.is_whole(slot) && reinterpret_cast<uintptr_t>(address) % 16 == 0) {
    store_whole(address, value);
    return;
  }
#pragma unroll
  for (int k = 0; k < kPerSlot<T>; ++k) {
    if (frame.has(frame.column(slot, k))) address[k] = value.x[k];
  }
}

__device__ __forceinline__ float reciprocal_root(float x) { return 1 / sqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return 1 / sqrt(x); }

}  // namespace ueo_fast::cuda
