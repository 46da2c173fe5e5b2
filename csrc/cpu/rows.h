// Rows of any storage type, read and written in padded tiles of the compute type, so that the loops
// over them need no remainder and no conversion.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "half.h"
#include "stream.h"
#include "tuning.h"
#include "ueo_loss.h"
#include "vectors.h"

namespace {

using ueo_fast::LogitsView;
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

// Memory to prefetch while something else is computed, kPad elements at a time. The hardware's
// prefetcher stops at page boundaries, and rows of logits cross many.
struct Ahead {
  const char* data;
  int64_t element_size;

  void prefetch(int64_t element) const {
    __builtin_prefetch(data + element * element_size, 0, 2);
  }
};

// The columns of a tile: `whole` of them in place, a multiple of kPad, then kPad more in `tail`
// where the tile does not end there (null where it does).
template <class P>
struct Columns {
  P whole_data;
  P tail;
  int64_t whole;
};

// Calls step(x, j) on the kPad columns at x, columns j to j + kPad of the tile.
template <class A, class F>
inline void for_each_pad(const Columns<const A*>& x, F&& step) {
  for (int64_t j = 0; j < x.whole; j += kPad) step(x.whole_data + j, j);
  if (x.tail) step(x.tail, x.whole);
}

// One row of logits of storage type S, seen as tiles of compute type A.
template <class A, class S>
struct RowReader {
  const S* data;
  int64_t columns;
  int64_t row_stride;
  A* buffer;              // one tile
  int64_t buffered = -1;  // where the columns begin of which a copy is in `buffer`

  RowReader(const LogitsView& view, int64_t row, A* buffer)
      : data(static_cast<const S*>(view.data) + row * view.row_stride),
        columns(view.columns),
        row_stride(view.row_stride),
        buffer(buffer) {}

  // In place if possible; otherwise a copy in `buffer`, which serves all passes over a row of one
  // tile. Padding is -inf: a column of probability 0.
  Columns<const A*> read(const Tile& tile) {
    if constexpr (std::is_same_v<A, S>) {
      const A* source = data + tile.begin;
      const int64_t whole = tile.valid / kPad * kPad;
      if (whole == tile.valid) return {source, nullptr, whole};
      copy(tile.begin + whole, tile.valid - whole);
      return {source, buffer, whole};
    } else {
      copy(tile.begin, tile.valid);
      return {buffer, nullptr, tile.padded};
    }
  }

  // The same tile of a later row. (After the last row the address may be invalid; such prefetches are
  // ignored.)
  Ahead ahead(const Tile& tile) const {
    const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(S));
    const int64_t rows_ahead = 1 + kPrefetchBytes / row_bytes;
    return {reinterpret_cast<const char*>(data + rows_ahead * row_stride + tile.begin), sizeof(S)};
  }

 private:
  void copy(int64_t begin, int64_t valid) {
    if (buffered == begin) return;
    buffered = begin;
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    A* __restrict to = buffer;
    // Write all of the last pad: reading a register back from several short stores would stall.
    for (int64_t j = 0; j < kPad; ++j) to[padded(valid) - kPad + j] = -kInfinity;
#pragma omp simd
    for (int64_t j = 0; j < valid; ++j) to[j] = to_float(data[begin + j]);
  }
};

// The larger of the scalars or registers a and b.
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// The largest value of a tile. NaN may be lost here; the exponentials bring it back.
template <class A>
inline A max_tile(const Columns<const A*>& x) {
  // Independent maxima: enough to hide their latency, with half of the registers of the older
  // instruction sets.
  constexpr int64_t kVectors = 4 * kPad / kLanes<A> < 8 ? 4 * kPad / kLanes<A> : 8;
  constexpr int64_t kChains = kVectors * kLanes<A>;
  Vector<A> max[kVectors];
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) max[v] = broadcast(-std::numeric_limits<A>::infinity());
  const A* data = x.whole_data;
  int64_t j = 0;
  for (; j + kChains <= x.whole; j += kChains) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) max[v] = larger(max[v], load(data + j + v * kLanes<A>));
  }
  for_each_pad<A>({data + j, x.tail, x.whole - j}, [&](const A* pad, int64_t) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kPad / kLanes<A>; ++v) {
      max[v] = larger(max[v], load(pad + v * kLanes<A>));
    }
  });
#pragma GCC unroll 8
  for (int64_t v = 1; v < kVectors; ++v) max[0] = larger(max[0], max[v]);
  A lane[kLanes<A>];
  store<A>(max[0], lane);
  for (int64_t n = kLanes<A> / 2; n > 0; n /= 2) {
    for (int64_t l = 0; l < n; ++l) lane[l] = larger(lane[l], lane[l + n]);
  }
  return lane[0];
}

template <class A, class S>
inline A row_max(RowReader<A, S>& row) {
  A max = -std::numeric_limits<A>::infinity();
  for_each_tile(row.columns, [&](const Tile& tile) {
    const A tile_max = max_tile(row.read(tile));
    max = tile_max > max ? tile_max : max;
  });
  return max;
}

// One contiguous row of results of storage type S, computed as tiles of compute type A.
template <class A, class S>
struct RowWriter {
  S* data;
  bool stream;

  RowWriter(void* base, int64_t row, int64_t columns, bool stream)
      : data(static_cast<S*>(base) + row * columns), stream(stream) {}

  // Where to compute the tile: in place as far as that is possible, else in `buffer`.
  Columns<A*> target(const Tile& tile, A* buffer) const {
    if constexpr (std::is_same_v<A, S>) {
      if (!stream) return {data + tile.begin, buffer, tile.valid / kPad * kPad};
    }
    return {buffer, nullptr, tile.padded};
  }

  // Stores what is not already in place.
  void write(const Tile& tile, const Columns<A*>& computed) const {
    S* out = data + tile.begin;
    if constexpr (std::is_same_v<A, S>) {
      if (stream) return stream_copy(out, computed.whole_data, tile.valid * sizeof(A));
      for (int64_t j = computed.whole; j < tile.valid; ++j) {
        out[j] = computed.tail[j - computed.whole];
      }
    } else {
      S converted[kTileColumns];
      S* to = stream ? converted : out;
#pragma omp simd
      for (int64_t j = 0; j < tile.valid; ++j) from_float(computed.whole_data[j], to[j]);
      if (stream) stream_copy(out, converted, tile.valid * sizeof(S));
    }
  }
};

}  // namespace
