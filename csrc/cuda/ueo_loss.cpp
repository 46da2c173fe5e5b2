// The loss's CUDA ops: tensors in, tensors out, around the kernels. Nothing here waits for the GPU.
#include "ueo_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../interface.h"
#include "../logits.h"
#include "../tensors.h"
#include "gpu.h"

namespace ueo_fast::cuda {
namespace {

Tensor checked(const Tensor& any_logits, const char* name = "logits") {
  const Tensor logits = with_adjacent_columns(any_logits, name);
  STD_TORCH_CHECK(logits.size(1) <= std::numeric_limits<int>::max() / 2,
                  "ueo_fast: the CUDA kernels take up to 2^30 - 1 classes, got ", logits.size(1));
  return logits;
}

// Outputs and inputs of a forward pass; owns what the call points to.
struct Forward {
  Tensor loss;
  Tensor saved;
  std::optional<Tensor> confidence;
  std::optional<Tensor> marginal_weights;
  std::optional<Tensor> workspace;
  ForwardCall call;

  template <class A>
  static const A* given(const Tensor& logits, const std::optional<Tensor>& weights,
                        std::optional<Tensor>& contiguous, const char* name) {
    if (weights) check_on_gpu_of(logits, *weights, name);
    return optional_weights<A>(weights, contiguous, logits.size(0), name);
  }

  Forward(const Tensor& logits, const std::optional<Tensor>& w, const std::optional<Tensor>& v,
          const UeoOptions& options, int64_t workspace_bytes)
      : loss(empty<0>(logits, {}, dtype_of(logits))), saved(empty_saved(logits)) {
    call.logits = view_of(logits);
    call.options = options;
    with_compute_type(call.logits.storage, [&](auto type) {
      using A = decltype(type);
      call.confidence = given<A>(logits, w, confidence, "confidence");
      call.marginal_weights = given<A>(logits, v, marginal_weights, "marginal_weights");
      const Saved<A> parts = parts_of<A>(saved, call.logits);
      call.summary = parts.summary;
      call.marginal = parts.marginal;
      call.row_stats = parts.row_stats;
    });
    call.loss = loss.mutable_data_ptr();
    if (logits.size(0) == 0) {
      torch::stable::zero_(loss);
      torch::stable::zero_(saved);
      return;
    }
    // Not a part of `saved`, which lives until backward: column sums of every block are far more.
    workspace = empty<1>(logits, {workspace_bytes}, ScalarType::Byte);
    call.workspace = workspace->mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& any_logits,
                                   const std::optional<Tensor>& confidence,
                                   const std::optional<Tensor>& marginal_weights, double trade_off,
                                   double confidence_scale, double eps) {
  const Tensor logits = checked(any_logits);
  const OnGpuOf gpu(logits);
  const LogitsView view = view_of(logits);
  const Forward forward(logits, confidence, marginal_weights, {trade_off, confidence_scale, eps},
                        forward_workspace(gpu.device, view));
  if (view.rows > 0) {
    check(with_storage(view.storage, [&]<Storage storage>() {
      return ueo_forward<storage>(gpu.device, gpu.stream, forward.call);
    }));
  }
  return {forward.loss, forward.saved};
}

// grad_loss: null for 1.
Tensor gradient(const OnGpuOf& gpu, const Tensor& logits, const void* grad_loss,
                const Tensor& saved, double trade_off, double eps) {
  const LogitsView view = view_of(logits);
  Tensor grad = empty<2>(logits, {view.rows, view.columns}, logits.scalar_type());
  if (view.rows == 0) return grad;
  BackwardCall call{view,    {trade_off, 1.0, eps}, grad_loss, nullptr, nullptr,
                    nullptr, grad.mutable_data_ptr()};
  with_compute_type(view.storage, [&](auto type) {
    const auto parts = parts_of<decltype(type)>(saved, view);
    call.summary = parts.summary;
    call.marginal = parts.marginal;
    call.row_stats = parts.row_stats;
  });
  check(with_storage(view.storage, [&]<Storage storage>() {
    return ueo_backward<storage>(gpu.device, gpu.stream, call);
  }));
  return grad;
}

Tensor backward(const Tensor& grad_loss, const Tensor& any_logits, const Tensor& saved,
                double trade_off, double eps) {
  const Tensor logits = checked(any_logits);
  check_saved(logits, grad_loss, saved);
  check_on_gpu_of(logits, grad_loss, "grad_loss");
  check_on_gpu_of(logits, saved, "saved");
  const OnGpuOf gpu(logits);
  return gradient(gpu, logits, grad_loss.const_data_ptr(), saved, trade_off, eps);
}

std::tuple<Tensor, Tensor, Tensor> loss_and_grad(const Tensor& any_logits,
                                                 const std::optional<Tensor>& confidence,
                                                 const std::optional<Tensor>& marginal_weights,
                                                 double trade_off, double confidence_scale,
                                                 double eps) {
  const Tensor logits = checked(any_logits);
  const OnGpuOf gpu(logits);
  // The workspace of forward is free again before the gradient is allocated.
  const auto [loss, saved] =
      forward(logits, confidence, marginal_weights, trade_off, confidence_scale, eps);
  return {loss, saved, gradient(gpu, logits, nullptr, saved, trade_off, eps)};
}

Tensor max_softmax_cuda(const Tensor& cosines, double scale) {
  const Tensor logits = checked(cosines, "cosines");
  const OnGpuOf gpu(logits);
  const LogitsView view = view_of(logits);
  Tensor out = empty<1>(logits, {view.rows}, dtype_of(logits));
  if (view.rows > 0) {
    check(with_storage(view.storage, [&]<Storage storage>() {
      return max_softmax<storage>(gpu.device, gpu.stream, view, scale, out.mutable_data_ptr());
    }));
  }
  return out;
}

int64_t cuda_interface_number() { return kInterface; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CUDA, m) {
  m.impl("ueo_loss_forward", TORCH_BOX(&forward));
  m.impl("ueo_loss_backward", TORCH_BOX(&backward));
  m.impl("ueo_loss_and_grad", TORCH_BOX(&loss_and_grad));
  m.impl("max_softmax", TORCH_BOX(&max_softmax_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_interface_number", TORCH_BOX(&cuda_interface_number));
}

}  // namespace ueo_fast::cuda
