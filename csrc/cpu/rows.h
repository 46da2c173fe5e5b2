// Rows of any storage type and stride, read and written in padded tiles of the compute type, so
// that the loops over them never meet a remainder, a conversion or a stride.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "half.h"
#include "tuning.h"
#include "ueo_loss.h"

namespace {

using ueo_fast::cpu::LogitsView;
using ueo_fast::cpu::tuning::kPad;
using ueo_fast::cpu::tuning::kPrefetchBytes;
using ueo_fast::cpu::tuning::kTileColumns;

// Columns [begin, begin + valid) of a row, computed as `padded` >= valid columns.
struct Tile {
  int64_t begin;
  int64_t valid;
  int64_t padded;
};

inline int64_t padded(int64_t columns) { return (columns + kPad - 1) / kPad * kPad; }

// Tells the compiler that n needs no remainder loop.
inline void assume_padded(int64_t n) {
  if (n % kPad != 0 || n <= 0) __builtin_unreachable();
}

template <class F>
inline void for_each_tile(int64_t columns, F&& f) {
  for (int64_t begin = 0; begin < columns; begin += kTileColumns) {
    const int64_t left = columns - begin;
    const int64_t n = left < kTileColumns ? left : kTileColumns;
    f(Tile{begin, n, padded(n)});
  }
}

// Memory to fetch while something else is computed, kPad elements at a time. The hardware's
// prefetcher stops at page boundaries, and rows of logits cross many.
struct Ahead {
  const char* data;
  int64_t element_size;

  void prefetch(int64_t element) const {
    __builtin_prefetch(data + element * element_size, 0, 2);
  }
};

// One row of logits of storage type S, seen as tiles of compute type A.
template <class A, class S>
struct RowReader {
  const S* data;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
  A* buffer;              // one tile
  int64_t buffered = -1;  // where the tile in `buffer` begins

  RowReader(const LogitsView& view, int64_t row, A* buffer)
      : data(static_cast<const S*>(view.data) + row * view.row_stride),
        columns(view.columns),
        row_stride(view.row_stride),
        column_stride(view.column_stride),
        buffer(buffer) {}

  // The tile itself where it can be used in place, else a copy padded with -inf: a column of
  // probability 0. A row of one tile is copied once for all passes over it.
  const A* read(const Tile& tile) {
    const S* __restrict source = data + tile.begin * column_stride;
    if constexpr (std::is_same_v<A, S>) {
      if (column_stride == 1 && tile.valid == tile.padded) return source;
    }
    if (buffered == tile.begin) return buffer;
    buffered = tile.begin;
    A* __restrict copy = buffer;
    if (column_stride == 1) {
#pragma omp simd
      for (int64_t j = 0; j < tile.valid; ++j) copy[j] = to_float(source[j]);
    } else {
      for (int64_t j = 0; j < tile.valid; ++j) copy[j] = to_float(source[j * column_stride]);
    }
    for (int64_t j = tile.valid; j < tile.padded; ++j) {
      copy[j] = -std::numeric_limits<A>::infinity();
    }
    return buffer;
  }

  // The same tile of a later row. (Behind the last row it is nobody's memory: a prefetch of that
  // is ignored.)
  Ahead ahead(const Tile& tile) const {
    const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(S));
    const int64_t rows_ahead = 1 + kPrefetchBytes / row_bytes;
    return {reinterpret_cast<const char*>(data + rows_ahead * row_stride + tile.begin), sizeof(S)};
  }
};

// kPad running sums. Spelled out because `omp simd reduction` without -fassociative-math ends in
// kPad dependent additions, which cost as much as 200 columns; a loop over the lanes inside a loop
// over the columns stays in registers and ends in a tree.
template <class A>
struct LaneSums {
  A lane[kPad] = {};

  double total() const {
    A part[kPad / 2];
    for (int64_t l = 0; l < kPad / 2; ++l) part[l] = lane[l] + lane[l + kPad / 2];
    for (int64_t l = 0; l < kPad / 4; ++l) part[l] += part[l + kPad / 4];
    return static_cast<double>(part[0] + part[2]) + static_cast<double>(part[1] + part[3]);
  }
};

template <class A>
inline A larger(A a, A b) {
  return a > b ? a : b;
}

// The largest value of n columns, n a multiple of kPad. NaN is ignored here and comes out of the
// exponentials instead.
template <class A>
inline A max_tile(const A* __restrict x, int64_t n) {
  assume_padded(n);
  constexpr int64_t kChains = 4 * kPad;  // enough independent maxima to hide their latency
  A max[kChains];
  for (int64_t l = 0; l < kChains; ++l) max[l] = -std::numeric_limits<A>::infinity();
  int64_t j = 0;
  for (; j + kChains <= n; j += kChains) {
#pragma omp simd
    for (int64_t l = 0; l < kChains; ++l) max[l] = larger(x[j + l], max[l]);
  }
  for (; j < n; j += kPad) {
#pragma omp simd
    for (int64_t l = 0; l < kPad; ++l) max[l] = larger(x[j + l], max[l]);
  }
  for (int64_t l = 0; l < 2 * kPad; ++l) max[l] = larger(max[l], max[l + 2 * kPad]);
  for (int64_t l = 0; l < kPad; ++l) max[l] = larger(max[l], max[l + kPad]);
  for (int64_t l = 0; l < kPad / 2; ++l) max[l] = larger(max[l], max[l + kPad / 2]);
  for (int64_t l = 0; l < kPad / 4; ++l) max[l] = larger(max[l], max[l + kPad / 4]);
  return larger(larger(max[0], max[1]), larger(max[2], max[3]));
}

template <class A, class S>
inline A row_max(RowReader<A, S>& row) {
  A max = -std::numeric_limits<A>::infinity();
  for_each_tile(row.columns, [&](const Tile& tile) {
    const A tile_max = max_tile(row.read(tile), tile.padded);
    max = tile_max > max ? tile_max : max;
  });
  return max;
}

// Copies past the cache (whole cache lines; the ragged ends go through it).
inline void stream_copy(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
#if defined(__SSE2__)
  const int64_t misaligned = -reinterpret_cast<int64_t>(to) & 63;
  const int64_t head = misaligned < bytes ? misaligned : bytes;
  __builtin_memcpy(to, from, static_cast<size_t>(head));
  int64_t done = head;
  for (; done + 64 <= bytes; done += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
#else
    for (int64_t part = done; part < done + 64; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part), value);
    }
#endif
  }
  __builtin_memcpy(to + done, from + done, static_cast<size_t>(bytes - done));
#else
  __builtin_memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Streamed lines must be visible before another thread is told that they are there.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One contiguous row of results of storage type S, computed as tiles of compute type A.
template <class A, class S>
struct RowWriter {
  S* data;
  bool stream;

  RowWriter(void* base, int64_t row, int64_t columns, bool stream)
      : data(static_cast<S*>(base) + row * columns), stream(stream) {}

  // Where to compute the tile: in place where that is possible, else in `buffer`.
  A* target(const Tile& tile, A* buffer) const {
    if constexpr (std::is_same_v<A, S>) {
      if (!stream && tile.valid == tile.padded) return data + tile.begin;
    }
    return buffer;
  }

  void write(const Tile& tile, const A* __restrict computed) const {
    S* __restrict out = data + tile.begin;
    if constexpr (std::is_same_v<A, S>) {
      if (stream) return stream_copy(out, computed, tile.valid * sizeof(A));
      if (computed == out) return;
    }
    S converted[kTileColumns];
    S* to = stream ? converted : out;
#pragma omp simd
    for (int64_t j = 0; j < tile.valid; ++j) from_float(computed[j], to[j]);
    if (stream) stream_copy(out, converted, tile.valid * sizeof(S));
  }
};

}  // namespace
