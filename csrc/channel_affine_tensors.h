// Turns tensors into what the kernels of channel_affine take, and checks them, the same on every
// device. Users see the friendlier errors of ueo_fast/normalization.py first.
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

// Refuses a tensor whose memory layout differs from that of x.
inline void check_like(const Tensor& x, const Tensor& tensor, const char* name) {
  bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = tensor.size(d) == x.size(d) &&
           (x.size(d) <= 1 || x.numel() == 0 || tensor.stride(d) == x.stride(d));
  }
  STD_TORCH_CHECK(same, "ueo_fast: ", name, " must have the shape, dtype and strides of x");
  check_memory(tensor, name);
}

// One number per channel, or null; adjacent, in the compute dtype of x or in that of x.
inline std::optional<Tensor> channel_values(const Tensor& x, const ChannelLayout& layout,
                                            const std::optional<Tensor>& values,
                                            const char* name) {
  if (!values) return values;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == layout.channels, "ueo_fast: ", name,
                  " must have shape (", layout.channels, ",)");
  STD_TORCH_CHECK(
      values->scalar_type() == dtype_of(x) || values->scalar_type() == x.scalar_type(),
      "ueo_fast: ", name,
      " must have the compute dtype of x (float64 for float64, else float32), or that of x");
  check_memory(*values, name);
  return values->is_contiguous() ? values : torch::stable::contiguous(*values);
}

// What the kernels take per channel, and the memory that holds it.
struct ChannelTensors {
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> mean;
  std::optional<Tensor> var;

  ChannelTensors(const Tensor& x, const ChannelLayout& layout,
                 const std::optional<Tensor>& any_weight, const std::optional<Tensor>& any_bias,
                 const std::optional<Tensor>& any_mean, const std::optional<Tensor>& any_var)
      : weight(channel_values(x, layout, any_weight, "weight")),
        bias(channel_values(x, layout, any_bias, "bias")),
        mean(channel_values(x, layout, any_mean, "mean")),
        var(channel_values(x, layout, any_var, "var")) {}
};

// An uninitialised gradient of `values`, or (0,) where it is not needed.
inline Tensor channel_gradient(const Tensor& x, const ChannelLayout& layout,
                               const std::optional<Tensor>& values, bool needed,
                               const char* name) {
  if (!needed) return empty<1>(x, {0}, x.scalar_type());
  STD_TORCH_CHECK(values, "ueo_fast: ", name, " is None, so it has no gradient");
  return empty<1>(x, {layout.channels}, values->scalar_type());
}

inline void check_mask(const Tensor& bits, const ChannelLayout& layout) {
  STD_TORCH_CHECK(bits.dim() == 1 && bits.scalar_type() == ScalarType::Byte &&
                      (bits.size(0) == 0 || bits.size(0) == mask_bytes(layout.elements())) &&
                      bits.is_contiguous(),
                  "ueo_fast: bits must be those of channel_affine_forward");
  check_memory(bits, "bits");
}

}  // namespace ueo_fast
