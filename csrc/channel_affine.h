// Scale and shift per channel: how a dense tensor lies in memory, the same on every device. No torch
// header.
#pragma once

#include <cstdint>

#include "storage.h"

namespace ueo_fast {

// A dense tensor in the order of its memory: element (o, c, i) is at (o * channels + c) * inner + i.
// NCHW: (N, C, H W). channels_last: (N H W, C, 1). (N, L, C): (N L, C, 1). (N, C): (N, C, 1).
struct ChannelLayout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t elements() const { return outer * channels * inner; }
};

// Whether the elements fill their memory without gaps or overlap, in whatever order of the
// dimensions. Then every dimension separates into (outer, channels, inner).
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  int64_t elements = 1;
  for (int64_t dim = 0; dim < dims; ++dim) elements *= sizes[dim];
  if (elements == 0) return true;
  // From the dimension of stride 1 upwards, each stride is the product of the sizes below.
  int64_t expected = 1;
  while (expected < elements) {
    int64_t found = -1;
    for (int64_t dim = 0; dim < dims; ++dim) {
      if (sizes[dim] > 1 && strides[dim] == expected) found = dim;
    }
    if (found < 0) return false;
    expected *= sizes[found];
  }
  return true;
}

// The layout of a dense tensor whose channels are dimension `dim`.
inline ChannelLayout channel_layout(const int64_t* sizes, const int64_t* strides, int64_t dims,
                                    int64_t dim) {
  const int64_t channels = sizes[dim];
  int64_t others = 1;
  for (int64_t d = 0; d < dims; ++d) others *= d == dim ? 1 : sizes[d];
  if (others == 0 || channels == 0) return {0, channels, 1};
  if (channels == 1) return {1, 1, others};  // its stride has no meaning
  return {others / strides[dim], channels, strides[dim]};
}

// Bytes of the mask: element e of the memory's order is bit e % 8 of byte e / 8, set unless the
// stored out[e] <= 0 (so NaN counts as positive, as in PyTorch's backward of relu).
inline int64_t mask_bytes(int64_t elements) { return (elements + 7) / 8; }

}  // namespace ueo_fast
