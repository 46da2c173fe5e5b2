// What the glue asks of the kernels of channel_affine: raw pointers and a stream, neither torch nor
// CUDA headers.
#pragma once

#include "affine_launch.h"

namespace ueo_fast::cuda {

// One number per channel, or null; in the compute dtype, or (`stored`) in that of x.
template <class Pointer>
struct ChannelNumbers {
  Pointer data = nullptr;
  bool stored = false;
};

// scale = weight / sqrt(var + eps), shift = bias - mean scale; what is null is left out.
struct ChannelParameters {
  ChannelNumbers<const void*> weight;
  ChannelNumbers<const void*> bias;
  ChannelNumbers<const void*> mean;
  ChannelNumbers<const void*> var;
  double eps = 0;
};

// All in the order of memory. At least one element. What kernels write starts at a multiple of 16
// bytes, what they read anywhere.
struct AffineForwardCall {
  ChannelLayout layout;
  const void* x;
  ChannelParameters parameters;
  const void* residual;  // or null
  bool relu;
  void* out;
  void* bits;            // mask_bytes(); null without residual or relu
};

struct AffineBackwardCall {
  ChannelLayout layout;
  const void* grad_out;
  const void* x;         // null where neither the mask nor a parameter gradient needs it
  ChannelParameters parameters;
  const void* bits;      // null: the mask is recomputed from x
  bool relu;
  void* grad_x;          // each null if it is not needed
  ChannelNumbers<void*> grad_weight;
  ChannelNumbers<void*> grad_bias;
  void* grad_residual;
  void* workspace;       // affine_backward_workspace() bytes; with a parameter gradient
};

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
