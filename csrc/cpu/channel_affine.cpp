// The CPU ops of channel_affine: tensors in, tensors out, around the driver.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../channel_affine_tensors.h"
#include "channel_affine_driver.h"
#include "threads.h"
#include "tuning.h"

namespace ueo_fast::cpu {
namespace {

ParallelFor threads_for(const ChannelLayout& layout) {
  return [elements = layout.elements()](int64_t n, const auto& body) {
    parallel_for(n, elements, body);
  };
}

// `like`: a result; see kAffineStreamBytes.
bool is_streamed(const Tensor& like, const ChannelLayout& layout, bool has_residual) {
  const int64_t bytes = layout.elements() * static_cast<int64_t>(like.element_size());
  return has_residual && layout.inner < tuning::kMinRun && bytes >= tuning::kAffineStreamBytes;
}

// `numbers` in the compute type, in place or in `copy`.
template <class A>
const A* computed(const Tensor& x, const std::optional<Tensor>& numbers,
                  std::optional<Tensor>& copy) {
  if (!numbers) return nullptr;
  if (numbers->scalar_type() == kComputeDtype<A>) return numbers->const_data_ptr<A>();
  copy = empty<1>(x, {numbers->size(0)}, kComputeDtype<A>);
  torch::stable::copy_(*copy, *numbers);
  return copy->const_data_ptr<A>();
}

// The parameters in the compute type, with the memory of those that were converted.
template <class A>
struct Computed {
  std::optional<Tensor> copies[4];
  ChannelParameters<A> parameters;

  Computed(const Tensor& x, const ChannelTensors& channel, double eps)
      : parameters{computed<A>(x, channel.weight, copies[0]),
                   computed<A>(x, channel.bias, copies[1]),
                   computed<A>(x, channel.mean, copies[2]),
                   computed<A>(x, channel.var, copies[3]), static_cast<A>(eps)} {}
};

// Where the driver computes a parameter's gradient: in place or, for another dtype, before a
// conversion.
template <class A>
struct Gradient {
  Tensor stored;
  std::optional<Tensor> computed;
  A* data = nullptr;

  Gradient(const Tensor& gradient, bool needed) : stored(gradient) {
    if (!needed) return;
    const bool same = stored.scalar_type() == kComputeDtype<A>;
    if (!same) computed = empty<1>(stored, {stored.size(0)}, kComputeDtype<A>);
    data = (same ? stored : *computed).template mutable_data_ptr<A>();
  }

  void store() {
    if (computed) torch::stable::copy_(stored, *computed);
  }
};

std::tuple<Tensor, Tensor> channel_affine_forward(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps,
    const std::optional<Tensor>& residual, int64_t dim, bool relu) {
  const Storage storage = storage_of(x, "x");
  const ChannelLayout layout = channel_layout(x, dim, "x");
  const ChannelTensors channel(x, layout, weight, bias, mean, var);
  if (residual) check_like(x, *residual, "residual");
  Tensor out = empty_as(x);
  const int64_t bytes = relu && residual ? mask_bytes(layout.elements()) : 0;
  Tensor bits = empty<1>(x, {bytes}, ScalarType::Byte);
  if (layout.elements() == 0) return {out, bits};
  with_compute_type(storage, [&](auto type) {
    using A = decltype(type);
    const AffineForward<A> args{storage,
                                0,
                                {},
                                x.const_data_ptr(),
                                residual ? residual->const_data_ptr() : nullptr,
                                out.mutable_data_ptr(),
                                bytes ? bits.mutable_data_ptr<uint8_t>() : nullptr,
                                relu,
                                is_streamed(out, layout, residual.has_value())};
    affine_forward<A>(affine_loops<A>(capability()), layout, args,
                      Computed<A>(x, channel, eps).parameters, threads_for(layout));
    return 0;
  });
  return {out, bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_affine_backward(
    const Tensor& grad_out, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& var, double eps, const Tensor& bits, int64_t dim, bool relu,
    bool needs_x, bool needs_weight, bool needs_bias, bool needs_residual) {
  const Storage storage = storage_of(grad_out, "grad_out");
  const ChannelLayout layout = channel_layout(grad_out, dim, "grad_out");
  const ChannelTensors channel(grad_out, layout, weight, bias, mean, var);
  check_mask(bits, layout);
  const bool has_bits = bits.size(0) > 0;
  if (x) {
    check_like(*x, grad_out, "grad_out");
    check_memory(*x, "x");
  }
  const ScalarType dtype = grad_out.scalar_type();
  Tensor grad_x = needs_x ? empty_as(grad_out) : empty<1>(grad_out, {0}, dtype);
  Tensor grad_residual = needs_residual ? empty_as(grad_out) : empty<1>(grad_out, {0}, dtype);
  Tensor grad_weight = channel_gradient(grad_out, layout, weight, needs_weight, "weight");
  Tensor grad_bias = channel_gradient(grad_out, layout, bias, needs_bias, "bias");
  if (layout.elements() == 0) {
    if (needs_weight) torch::stable::zero_(grad_weight);
    if (needs_bias) torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }
  STD_TORCH_CHECK(x || !(needs_weight || needs_bias || (relu && !has_bits)),
                  "ueo_fast: x is needed for the sums and, without bits, for the mask");
  STD_TORCH_CHECK(has_bits || !(relu && needs_residual),
                  "ueo_fast: the gradient of a residual under relu needs the bits");
  with_compute_type(storage, [&](auto type) {
    using A = decltype(type);
    const AffineBackward<A> args{storage,
                                 0,
                                 {},
                                 grad_out.const_data_ptr(),
                                 x ? x->const_data_ptr() : nullptr,
                                 relu && has_bits ? bits.const_data_ptr<uint8_t>() : nullptr,
                                 needs_x ? grad_x.mutable_data_ptr() : nullptr,
                                 needs_residual ? grad_residual.mutable_data_ptr() : nullptr,
                                 relu,
                                 is_streamed(grad_out, layout, needs_residual)};
    Gradient<A> by_weight(grad_weight, needs_weight);
    Gradient<A> by_bias(grad_bias, needs_bias);
    affine_backward<A>(affine_loops<A>(capability()), layout, args,
                       Computed<A>(grad_out, channel, eps).parameters, by_weight.data,
                       by_bias.data, threads_for(layout));
    by_weight.store();
    by_bias.store();
    return 0;
  });
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CPU, m) {
  m.impl("channel_affine_forward", TORCH_BOX(&channel_affine_forward));
  m.impl("channel_affine_backward", TORCH_BOX(&channel_affine_backward));
}

}  // namespace ueo_fast::cpu
