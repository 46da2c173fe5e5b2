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

std::tuple<Tensor, Tensor> channel_affine_forward(const Tensor& x, const Tensor& scale,
                                                  const Tensor& shift,
                                                  const std::optional<Tensor>& residual,
                                                  int64_t dim, bool relu) {
  const Storage storage = storage_of(x, "x");
  const ChannelLayout layout = channel_layout(x, dim, "x");
  const Tensor scales = channel_values(x, layout, scale, "scale");
  const Tensor shifts = channel_values(x, layout, shift, "shift");
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
    affine_forward<A>(affine_loops<A>(capability()), layout, args, scales.const_data_ptr<A>(),
                      shifts.const_data_ptr<A>(), threads_for(layout));
    return 0;
  });
  return {out, bits};
}

std::tuple<Tensor, Tensor, Tensor> channel_affine_backward(
    const Tensor& grad_out, const std::optional<Tensor>& x, const Tensor& scale,
    const Tensor& shift, const Tensor& center, const Tensor& bits, int64_t dim, bool relu,
    bool needs_x, bool needs_sums, bool needs_residual) {
  const Storage storage = storage_of(grad_out, "grad_out");
  const ChannelLayout layout = channel_layout(grad_out, dim, "grad_out");
  const Tensor scales = channel_values(grad_out, layout, scale, "scale");
  const Tensor shifts = channel_values(grad_out, layout, shift, "shift");
  const Tensor centers = channel_values(grad_out, layout, center, "center");
  check_mask(bits, layout);
  const bool has_bits = bits.size(0) > 0;
  if (x) {
    check_like(*x, grad_out, "grad_out");
    check_memory(*x, "x");
  }
  const ScalarType dtype = grad_out.scalar_type();
  Tensor grad_x = needs_x ? empty_as(grad_out) : empty<1>(grad_out, {0}, dtype);
  Tensor grad_residual = needs_residual ? empty_as(grad_out) : empty<1>(grad_out, {0}, dtype);
  Tensor sums = needs_sums ? empty<2>(grad_out, {2, layout.channels}, dtype_of(grad_out))
                           : empty<1>(grad_out, {0}, dtype_of(grad_out));
  if (layout.elements() == 0) {
    if (needs_sums) torch::stable::zero_(sums);
    return {grad_x, sums, grad_residual};
  }
  STD_TORCH_CHECK(x || !(needs_sums || (relu && !has_bits)),
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
    affine_backward<A>(affine_loops<A>(capability()), layout, args, scales.const_data_ptr<A>(),
                       shifts.const_data_ptr<A>(), centers.const_data_ptr<A>(),
                       needs_sums ? sums.mutable_data_ptr<A>() : nullptr, threads_for(layout));
    return 0;
  });
  return {grad_x, sums, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CPU, m) {
  m.impl("channel_affine_forward", TORCH_BOX(&channel_affine_forward));
  m.impl("channel_affine_backward", TORCH_BOX(&channel_affine_backward));
}

}  // namespace ueo_fast::cpu
