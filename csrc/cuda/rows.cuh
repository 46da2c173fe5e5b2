// Rows as aligned 16-byte slots, wherever they start: a slot is loaded, cached and stored by one
// thread, the same for every row of its block, so that no thread waits for another's data.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace ueo_fast::cuda {

// The type of all arithmetic: double for double, float for everything else.
template <class T>
using ComputeType = decltype(to_compute(T{}));

template <class T>
inline constexpr int kPerSlot = 16 / static_cast<int>(sizeof(T));

template <class T>
struct alignas(16) Slot {
  T x[kPerSlot<T>];
};

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return to_storage<T>(-INFINITY);
}

// A plain assignment may end up as four stores: the compiler merges it with those, element by
// element, of the adjacent branch.
template <class T>
__device__ __forceinline__ void store_whole(T* to, const Slot<T>& value) {
  uint4 bits;
  memcpy(&bits, &value, 16);
#if defined(__CUDA_ARCH__)
  __stwb(reinterpret_cast<uint4*>(to), bits);
#else
  *reinterpret_cast<uint4*>(to) = bits;
#endif
}
template <class T>
__device__ __forceinline__ void store_whole(T* to, const Slot<T>& value, bool stream) {
  if (stream) {
    uint4 bits;
    memcpy(&bits, &value, 16);
    store_streaming(reinterpret_cast<uint4*>(to), bits);
  } else {
    store_whole(to, value);
  }
}

// Writes into the caller's slot: returned by value, halves would be moved one by one.
template <class T>
__device__ __forceinline__ void load_whole(Slot<T>& value, const void* from) {
  const uint4 bits = *static_cast<const uint4*>(from);
  memcpy(&value, &bits, 16);
}

// Where the columns of a row lie in its slots: column c is element (shift + c) % kPerSlot of slot
// (shift + c) / kPerSlot.
template <class T>
struct Frame {
  int shift;
  int columns;
  int slots;

  __device__ __forceinline__ Frame(const T* row, int columns_)
      : shift(static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPerSlot<T>)),
        columns(columns_),
        slots((shift + columns_ + kPerSlot<T> - 1) / kPerSlot<T>) {}

  __device__ __forceinline__ int column(int slot, int element) const {
    return slot * kPerSlot<T> + element - shift;
  }
  __device__ __forceinline__ bool has(int column) const { return column >= 0 && column < columns; }
  // Whether all elements of the slot are columns of the row.
  __device__ __forceinline__ bool is_whole(int slot) const {
    return has(column(slot, 0)) && has(column(slot, kPerSlot<T> - 1));
  }
};

// A (rows, columns) matrix whose columns are adjacent.
template <class T>
struct Matrix {
  const T* data;
  const T* end;  // one past its last element
  int64_t rows;
  int64_t row_stride;  // elements, >= 0
  int columns;
  bool sticks_out;  // starts or ends within a slot

  // A slot at either end of a row holds its neighbours' elements; at either end of the matrix it may be
  // outside the allocation.
  __device__ __forceinline__ bool is_readable(const T* slot) const {
    return slot >= data && slot + kPerSlot<T> <= end;
  }
};

template <class T>
Matrix<T> matrix_of(const void* data, int64_t rows, int64_t columns, int64_t row_stride) {
  const T* begin = static_cast<const T*>(data);
  const T* end = begin + (rows - 1) * row_stride + columns;
  const bool sticks_out = reinterpret_cast<uintptr_t>(begin) % 16 != 0 ||
                          reinterpret_cast<uintptr_t>(end) % 16 != 0;
  return {begin, end, rows, row_stride, static_cast<int>(columns), sticks_out};
}

// One row in global memory.
template <class T>
struct Row {
  const Matrix<T>& matrix;
  const T* begin;  // its column 0
  Frame<T> frame;

  __device__ __forceinline__ const T* address(int slot) const {
    return begin + frame.column(slot, 0);
  }
  // Whether all slots of the row can be read as a whole.
  __device__ __forceinline__ bool is_readable() const {
    return matrix.is_readable(address(0)) && matrix.is_readable(address(frame.slots - 1));
  }
  // The slot as it lies in memory; only what belongs to the row is sure to be right.
  __device__ __forceinline__ Slot<T> load(int slot) const {
    Slot<T> value;
    const T* from = address(slot);
    if (matrix.is_readable(from)) {
      load_whole(value, from);
    } else {
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        value.x[k] = frame.has(frame.column(slot, k)) ? from[k] : minus_infinity<T>();
      }
    }
    return value;
  }
};

// Elements outside the row become classes that are masked: probability 0, gradient 0.
template <class T>
__device__ __forceinline__ void mask(const Frame<T>& frame, int slot, Slot<T>& value) {
  if (frame.is_whole(slot)) return;
#pragma unroll
  for (int k = 0; k < kPerSlot<T>; ++k) {
    if (!frame.has(frame.column(slot, k))) value.x[k] = minus_infinity<T>();
  }
}

// A row that is read once, as it comes: kStreamedSlots loads of a thread are under way before the first
// is used. They are predicated: behind a branch each, they would wait for each other.
template <class T>
struct StreamedRow {
  template <class Team, class F>
  __device__ __forceinline__ void for_each(const Team& team, const Row<T>& row, F&& f) const {
    const int slots = row.frame.slots;
    if (!row.is_readable()) {  // at most two rows of a matrix
#pragma unroll 1
      for (int slot = team.rank; slot < slots; slot += team.size) use(row, slot, row.load(slot), f);
      return;
    }
#pragma unroll 1
    for (int first = team.rank; first < slots; first += tuning::kStreamedSlots * team.size) {
      uint4 bits[tuning::kStreamedSlots] = {};
#pragma unroll
      for (int i = 0; i < tuning::kStreamedSlots; ++i) {
        const int slot = first + i * team.size;
        load_slot_if(slot < slots, bits[i], reinterpret_cast<const uint4*>(row.address(slot)));
      }
#pragma unroll
      for (int i = 0; i < tuning::kStreamedSlots; ++i) {
        const int slot = first + i * team.size;
        if (slot >= slots) return;
        Slot<T> value;
        memcpy(&value, &bits[i], 16);
        use(row, slot, value, f);
      }
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ static void use(const Row<T>& row, int slot, Slot<T> value, F&& f) {
    mask(row.frame, slot, value);
    f(slot, value);
  }
};

// A row whose first `cached` slots stay in shared memory; the others are read again.
template <class T>
struct CachedRow {
  Slot<T>* cache;
  int cached;

  // Starts to bring a slot of `row`; to be waited for before it is used.
  __device__ __forceinline__ void fetch(const Row<T>& row, int slot) const {
    if (slot >= cached) return;
    if (row.matrix.is_readable(row.address(slot))) {
      copy_async(&cache[slot], row.address(slot));
    } else {
      cache[slot] = row.load(slot);
    }
  }
  template <class Team>
  __device__ __forceinline__ void fetch_all(const Team& team, const Row<T>& row) const {
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) fetch(row, slot);
  }

  // f(slot number, slot) for every slot of the thread; elements outside the row are -inf.
  template <class Team, class F>
  __device__ __forceinline__ void for_each(const Team& team, const Row<T>& row, F&& f) const {
#pragma unroll 1
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) {
      Slot<T> value;
      if (slot < cached) {
        load_whole(value, &cache[slot]);
      } else {
        value = row.load(slot);
      }
      mask(row.frame, slot, value);
      f(slot, value);
    }
  }
};

}  // namespace ueo_fast::cuda
