// Rows in registers: lanes of a warp hold a whole row, the same slots of every row in the same lane,
// while the next row is loaded. Edges are decided once per thread, not once per row.
#pragma once

#include "rows.cuh"
#include "team.cuh"

namespace ueo_fast::cuda {

// The bits of -inf in every element of a word.
template <class T>
inline constexpr unsigned kMasked = sizeof(T) == 4                ? 0xff800000u
                                    : std::is_same_v<T, BFloat16> ? 0xff80ff80u
                                                                  : 0xfc00fc00u;

// Of shared memory, written once per block.
struct Edges {
  uint4 keep_first;  // the bits of a row's first slot that belong to it
  uint4 keep_last;   // and of its last
  uint4 start;       // the first slot of the matrix, where it sticks out of it,
  uint4 end;         // and the last
};
static_assert(sizeof(Edges) == kEdgesBytes);

// The larger of two pairs of half elements; a number beats NaN, as in larger().
template <class T>
__device__ __forceinline__ unsigned larger_pair(unsigned a, unsigned b) {
#if defined(__CUDA_ARCH__)
  unsigned most;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  }
  return most;
#else
  T x[2], y[2];
  memcpy(x, &a, 4);
  memcpy(y, &b, 4);
  for (int i = 0; i < 2; ++i) x[i] = to_storage<T>(larger(to_compute(x[i]), to_compute(y[i])));
  memcpy(&a, x, 4);
  return a;
#endif
}

template <class T, int kSlots, int kLanes>
struct HeldRows {
  static constexpr int kElements = kSlots * kPerSlot<T>;
  // Slots that every lane has of every row, and the first that can be the last of a row.
  static constexpr int kSure = slots_for_sure<sizeof(T)>(kLanes, kSlots);
  static constexpr int kFirstLast = kSure > 0 ? kSure - 1 : 0;
  static constexpr int kHop = kLanes * kPerSlot<T>;  // elements from one slot of a lane to the next
  static_assert(sizeof(T) <= 4);

  const Matrix<T>& matrix;
  const Edges& edges;
  unsigned rows;
  int rank;          // of the lane's first slot
  int shift;         // of the rows in their slots
  int inside;        // slots of the lane that belong to a row
  bool first_cut;    // whether its first slot starts with elements of a neighbour,
  bool last_cut;     // and its last one, which is the row's, ends with such
  const T* next;     // the lane's first slot of the row to be fetched
  int64_t step;      // elements from there to the next one after it
  uint4 slot[kSlots];

  __device__ __forceinline__ HeldRows(const Matrix<T>& matrix_, Edges& shared, int rank_,
                                      const Frame<T>& frame)
      : matrix(matrix_),
        edges(shared),
        rows(static_cast<unsigned>(matrix_.rows)),
        rank(rank_),
        shift(frame.shift) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      slot[i] = {kMasked<T>, kMasked<T>, kMasked<T>, kMasked<T>};
    }
    inside = kSure;
#pragma unroll
    for (int i = kSure; i < kSlots; ++i) inside += rank + i * kLanes < frame.slots ? 1 : 0;
    first_cut = rank == 0 && shift != 0;
    last_cut = rank + (inside - 1) * kLanes == frame.slots - 1 &&
               (shift + frame.columns) % kPerSlot<T> != 0;
    if (threadIdx.x < kPerSlot<T>) write_edges(shared, frame, static_cast<int>(threadIdx.x));
  }

  // One element of every slot in `edges`; a barrier of the block must follow.
  __device__ __forceinline__ void write_edges(Edges& shared, const Frame<T>& frame,
                                              int element) const {
    const bool in_first = frame.column(0, element) >= 0;
    const bool in_last = frame.column(frame.slots - 1, element) < frame.columns;
    const auto keep_element = [&](uint4& bits, bool inside_row) {
      if constexpr (sizeof(T) == 4) {
        reinterpret_cast<unsigned*>(&bits)[element] = inside_row ? ~0u : 0;
      } else {
        reinterpret_cast<uint16_t*>(&bits)[element] = inside_row ? 0xffff : 0;
      }
    };
    keep_element(shared.keep_first, in_first);
    keep_element(shared.keep_last, in_last);
    if (!matrix.sticks_out) return;
    const auto position = [](const T* at) {
      return static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(T) % kPerSlot<T>);
    };
    const auto copy_element = [&](uint4& bits, const T* from) {
      const bool there = from >= matrix.data && from < matrix.end;
      reinterpret_cast<T*>(&bits)[element] = there ? *from : minus_infinity<T>();
    };
    copy_element(shared.start, matrix.data + element - position(matrix.data));
    copy_element(shared.end, matrix.end + element - position(matrix.end));
  }

  // The rows that will be fetched: `first`, first + hop, ...
  __device__ __forceinline__ void start(unsigned first, int64_t hop) {
    next = matrix.data + (first * matrix.row_stride - shift) + rank * kPerSlot<T>;
    step = hop * matrix.row_stride;
  }

  // Starts to load the next row, number `row`, if there is one; the row held has been used.
  __device__ __forceinline__ void fetch(unsigned row) {
    if (matrix.sticks_out) {
      fetch_readable(row);
    } else {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const bool wanted = row < rows && (i < kSure || i < inside);
        load_slot_if(wanted, slot[i], reinterpret_cast<const uint4*>(next + i * kHop));
      }
    }
    next += step;
  }
  // The same where the matrix's first or last slot may extend outside the allocation.
  __device__ __forceinline__ void fetch_readable(unsigned row) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const T* from = next + i * kHop;
      const bool wanted = row < rows && i < inside && matrix.is_readable(from);
      load_slot_if(wanted, slot[i], reinterpret_cast<const uint4*>(from));
    }
  }

  // Whether slot i is the lane's last of a row. For sm_100 and newer, nvcc puts `inside - 1` in the
  // place of an i that was compared with it, and an index known only at run time sends `slot` to local
  // memory.
  __device__ __forceinline__ bool is_last(int i) const { return i + 1 == inside; }

  __device__ __forceinline__ void keep(int i, const uint4& bits) {
    slot[i].x = (slot[i].x & bits.x) | (kMasked<T> & ~bits.x);
    slot[i].y = (slot[i].y & bits.y) | (kMasked<T> & ~bits.y);
    slot[i].z = (slot[i].z & bits.z) | (kMasked<T> & ~bits.z);
    slot[i].w = (slot[i].w & bits.w) | (kMasked<T> & ~bits.w);
  }

  // The row that was fetched, elements of neighbours as masked classes; returns the lane's largest.
  __device__ __forceinline__ float take(float (&x)[kElements]) {
    if (matrix.sticks_out) {
      const T* held = next - step;
      if (held < matrix.data && rank == 0) slot[0] = edges.start;
#pragma unroll
      for (int i = kFirstLast; i < kSlots; ++i) {
        if (is_last(i) && held + i * kHop + kPerSlot<T> > matrix.end) slot[i] = edges.end;
      }
    }
    if (last_cut) {
      const uint4 bits = edges.keep_last;
#pragma unroll
      for (int i = kFirstLast; i < kSlots; ++i) {
        if (is_last(i)) keep(i, bits);
      }
    }
    if (first_cut) keep(0, edges.keep_first);
    float most;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        x[4 * i] = float_of_bits(slot[i].x);
        x[4 * i + 1] = float_of_bits(slot[i].y);
        x[4 * i + 2] = float_of_bits(slot[i].z);
        x[4 * i + 3] = float_of_bits(slot[i].w);
      }
      most = x[0];
#pragma unroll
      for (int i = 1; i < kElements; ++i) most = larger(most, x[i]);
    } else {
      unsigned pair = kMasked<T>;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const unsigned word[4] = {slot[i].x, slot[i].y, slot[i].z, slot[i].w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          pair = larger_pair<T>(pair, word[k]);
          x[8 * i + 2 * k] = low<T>(word[k]);
          x[8 * i + 2 * k + 1] = high<T>(word[k]);
        }
      }
      most = larger(low<T>(pair), high<T>(pair));
    }
    return most;
  }

  // Writes a row that starts at the same offset from a 16-byte boundary as those of the matrix.
  __device__ __forceinline__ void store(T* row, const float (&value)[kElements], bool stream) const {
    T* own = row + (rank * kPerSlot<T> - shift);
    const int end = last_cut ? (shift + matrix.columns) % kPerSlot<T> : kPerSlot<T>;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i >= kSure && i >= inside) continue;
      T* address = own + i * kHop;
      Slot<T> out;
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        out.x[k] = to_storage<T>(value[i * kPerSlot<T> + k]);
      }
      const bool ends_here = i >= kFirstLast && last_cut && i >= inside - 1;
      if (ends_here || (i == 0 && first_cut)) {
        const int from = i == 0 && first_cut ? shift : 0;
        const int upto = ends_here ? end : kPerSlot<T>;
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) {
          if ((i > 0 || k >= from) && k < upto) address[k] = out.x[k];
        }
      } else {
        store_whole(address, out, stream);
      }
    }
  }
};

}  // namespace ueo_fast::cuda
