// From tensors to what the kernels of channel_affine take, and what they ask of their arguments. The
// same on every device. Users meet the friendlier errors of ueo_fast/normalization.py first.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "channel_affine.h"
#include "logits.h"
#include "tensors.h"

namespace ueo_fast {

inline ChannelLayout channel_layout(const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(dim >= 0 && dim < x.dim(), "ueo_fast: dim must be a dimension of ", name,
                  ", from 0 to ", x.dim() - 1, ", got ", dim);
  STD_TORCH_CHECK(is_dense(x.sizes().data(), x.strides().data(), x.dim()), "ueo_fast: ", name,
                  " must be dense: make it so with .contiguous()");
  check_memory(x, name);
  return channel_layout(x.sizes().data(), x.strides().data(), x.dim(), dim);
}

// Refuses a tensor whose elements do not lie in memory as those of x do.
inline void check_like(const Tensor& x, const Tensor& tensor, const char* name) {
  bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = tensor.size(d) == x.size(d) &&
           (x.size(d) <= 1 || x.numel() == 0 || tensor.stride(d) == x.stride(d));
  }
  STD_TORCH_CHECK(same, "ueo_fast: ", name, " must have the shape, dtype and strides of x");
  check_memory(tensor, name);
}

// One value per channel, adjacent, in the compute dtype of x.
inline Tensor channel_values(const Tensor& x, const ChannelLayout& layout, const Tensor& values,
                             const char* name) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == layout.channels, "ueo_fast: ", name,
                  " must have shape (", layout.channels, ",)");
  STD_TORCH_CHECK(values.scalar_type() == dtype_of(x), "ueo_fast: ", name,
                  " must have the compute dtype of x (float64 for float64, else float32)");
  check_memory(values, name);
  return torch::stable::contiguous(values);
}

inline void check_mask(const Tensor& bits, const ChannelLayout& layout) {
  STD_TORCH_CHECK(bits.dim() == 1 && bits.scalar_type() == ScalarType::Byte &&
                      (bits.size(0) == 0 || bits.size(0) == mask_bytes(layout.elements())) &&
                      bits.is_contiguous(),
                  "ueo_fast: bits must be those of channel_affine_forward");
  check_memory(bits, "bits");
}

}  // namespace ueo_fast
