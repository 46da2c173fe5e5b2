// What the glue asks of the kernels of channel_affine: raw pointers and a stream, neither torch nor
// CUDA headers.
#pragma once

#include "affine_launch.h"

namespace ueo_fast::cuda {

// All in the order of memory; scale, shift, center and sums in the compute dtype. At least one
// element. What kernels write starts at a multiple of 16 bytes, what they read anywhere.
struct AffineForwardCall {
  ChannelLayout layout;
  const void* x;
  const void* scale;     // (channels,)
  const void* shift;     // (channels,)
  const void* residual;  // or null
  bool relu;
  void* out;
  void* bits;            // mask_bytes(); null without residual or relu
};

struct AffineBackwardCall {
  ChannelLayout layout;
  const void* grad_out;
  const void* x;         // null where neither the mask nor sums need it
  const void* scale;
  const void* shift;
  const void* center;
  const void* bits;      // null: the mask is recomputed from x
  bool relu;
  void* grad_x;          // each null if it is not needed
  void* sums;            // (2, channels)
  void* grad_residual;
  void* workspace;       // affine_backward_workspace() bytes; with sums
};

inline int bytes_of(Storage storage) {
  return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2;
}

inline int64_t affine_backward_workspace(const Device& device, const ChannelLayout& layout,
                                         Storage storage) {
  return affine_workspace(plan_affine(device, layout, bytes_of(storage), true), bytes_of(storage));
}

// Each is compiled once per storage type and returns a cudaError_t.
template <Storage storage>
int channel_affine_forward(const Device& device, void* stream, const AffineForwardCall& call);
template <Storage storage>
int channel_affine_backward(const Device& device, void* stream, const AffineBackwardCall& call);

}  // namespace ueo_fast::cuda
