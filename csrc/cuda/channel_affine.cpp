// The CUDA ops of channel_affine: tensors in, tensors out, around the kernels. Nothing here waits
// for the GPU.
#include "channel_affine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../channel_affine_tensors.h"
#include "gpu.h"

namespace ueo_fast::cuda {
namespace {

ChannelLayout checked_layout(const Tensor& x, int64_t dim, const char* name) {
  const ChannelLayout layout = channel_layout(x, dim, name);
  STD_TORCH_CHECK(layout.channels <= std::numeric_limits<int>::max() / 8,
                  "ueo_fast: the CUDA kernels take up to 2^28 channels, got ", layout.channels);
  return layout;
}

ChannelNumbers<const void*> numbers_of(const Tensor& x, const std::optional<Tensor>& values,
                                       const char* name) {
  if (!values) return {};
  check_on_gpu_of(x, *values, name);
  return {values->const_data_ptr(), values->scalar_type() == x.scalar_type()};
}

ChannelParameters parameters_of(const Tensor& x, const ChannelTensors& channel, double eps) {
  return {numbers_of(x, channel.weight, "weight"), numbers_of(x, channel.bias, "bias"),
          numbers_of(x, channel.mean, "mean"), numbers_of(x, channel.var, "var"), eps};
}

ChannelNumbers<void*> gradient_of(const Tensor& x, Tensor& gradient, bool needed) {
  if (!needed) return {};
  return {gradient.mutable_data_ptr(), gradient.scalar_type() == x.scalar_type()};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& mean,
                                   const std::optional<Tensor>& var, double eps,
                                   const std::optional<Tensor>& residual, int64_t dim, bool relu) {
  const Storage storage = storage_of(x, "x");
  const ChannelLayout layout = checked_layout(x, dim, "x");
  const OnGpuOf gpu(x);
  const ChannelTensors channel(x, layout, weight, bias, mean, var);
  const ChannelParameters parameters = parameters_of(x, channel, eps);
  if (residual) {
    check_on_gpu_of(x, *residual, "residual");
    check_like(x, *residual, "residual");
  }
  Tensor out = empty_as(x);
  const int64_t bytes = relu && residual ? mask_bytes(layout.elements()) : 0;
  Tensor bits = empty<1>(x, {bytes}, ScalarType::Byte);
  if (layout.elements() == 0) return {out, bits};
  const AffineForwardCall call{layout,
                               x.const_data_ptr(),
                               parameters,
                               residual ? residual->const_data_ptr() : nullptr,
                               relu,
                               out.mutable_data_ptr(),
                               bytes > 0 ? bits.mutable_data_ptr() : nullptr};
  check(with_storage(storage, [&]<Storage kStorage>() {
    return channel_affine_forward<kStorage>(gpu.device, gpu.stream, call);
  }));
  return {out, bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& var, double eps, const Tensor& bits, int64_t dim, bool relu,
    bool needs_x, bool needs_weight, bool needs_bias, bool needs_residual) {
  const Storage storage = storage_of(grad_out, "grad_out");
  const ChannelLayout layout = checked_layout(grad_out, dim, "grad_out");
  const OnGpuOf gpu(grad_out);
  const ChannelTensors channel(grad_out, layout, weight, bias, mean, var);
  const ChannelParameters parameters = parameters_of(grad_out, channel, eps);
  check_on_gpu_of(grad_out, bits, "bits");
  check_mask(bits, layout);
  const bool has_bits = bits.size(0) > 0;
  if (x) {
    check_on_gpu_of(grad_out, *x, "x");
    check_like(*x, grad_out, "grad_out");
    check_memory(*x, "x");
  }
  const ScalarType dtype = grad_out.scalar_type();
  Tensor grad_x = needs_x ? empty_as(grad_out) : empty<1>(grad_out, {0}, dtype);
  Tensor grad_residual = needs_residual ? empty_as(grad_out) : empty<1>(grad_out, {0}, dtype);
  Tensor grad_weight = channel_gradient(grad_out, layout, weight, needs_weight, "weight");
  Tensor grad_bias = channel_gradient(grad_out, layout, bias, needs_bias, "bias");
  const bool needs_sums = needs_weight || needs_bias;
  if (layout.elements() == 0) {
    if (needs_weight) torch::stable::zero_(grad_weight);
    if (needs_bias) torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }
  STD_TORCH_CHECK(x || !(needs_sums || (relu && !has_bits)),
                  "ueo_fast: x is needed for the sums and, without bits, for the mask");
  STD_TORCH_CHECK(has_bits || !(relu && needs_residual),
                  "ueo_fast: the gradient of a residual under relu needs the bits");
  if (!needs_x && !needs_sums && !needs_residual) {
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }
  std::optional<Tensor> workspace;
  if (needs_sums) {
    const int64_t bytes = affine_backward_workspace(gpu.device, layout, storage);
    workspace = empty<1>(grad_out, {bytes}, ScalarType::Byte);
  }
  const AffineBackwardCall call{layout,
                                grad_out.const_data_ptr(),
                                x ? x->const_data_ptr() : nullptr,
                                parameters,
                                relu && has_bits ? bits.const_data_ptr() : nullptr,
                                relu,
                                needs_x ? grad_x.mutable_data_ptr() : nullptr,
                                gradient_of(grad_out, grad_weight, needs_weight),
                                gradient_of(grad_out, grad_bias, needs_bias),
                                needs_residual ? grad_residual.mutable_data_ptr() : nullptr,
                                workspace ? workspace->mutable_data_ptr() : nullptr};
  check(with_storage(storage, [&]<Storage kStorage>() {
    return channel_affine_backward<kStorage>(gpu.device, gpu.stream, call);
  }));
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CUDA, m) {
  m.impl("channel_affine_forward", TORCH_BOX(&forward));
  m.impl("channel_affine_backward", TORCH_BOX(&backward));
}

}  // namespace ueo_fast::cuda
