// The loss's CPU ops: tensors in, tensors out, around the driver.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../interface.h"
#include "../logits.h"
#include "../tensors.h"
#include "threads.h"
#include "tuning.h"
#include "ueo_loss_driver.h"

namespace ueo_fast::cpu {
namespace {

ParallelFor threads_for(const LogitsView& logits) {
  return [elements = logits.rows * logits.columns](int64_t n, const auto& body) {
    parallel_for(n, elements, body);
  };
}

std::tuple<Tensor, Tensor> ueo_loss_forward(const Tensor& any_logits,
                                            const std::optional<Tensor>& confidence,
                                            const std::optional<Tensor>& marginal_weights,
                                            double trade_off, double confidence_scale, double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  const LogitsView view = view_of(logits);
  Tensor loss = empty<0>(logits, {}, dtype_of(logits));
  Tensor saved = empty_saved(logits);
  if (view.rows == 0) {
    torch::stable::zero_(loss);
    torch::stable::zero_(saved);
    return {loss, saved};
  }
  with_compute_type(view.storage, [&](auto type) {
    using A = decltype(type);
    const Saved<A> parts = parts_of<A>(saved, view);
    std::optional<Tensor> confidence_data;
    std::optional<Tensor> marginal_data;
    const ForwardRows<A> args{
        view,
        {trade_off, confidence_scale, eps},
        optional_weights<A>(confidence, confidence_data, view.rows, "confidence"),
        optional_weights<A>(marginal_weights, marginal_data, view.rows, "marginal_weights"),
        parts.row_stats};
    *loss.mutable_data_ptr<A>() = static_cast<A>(ueo_forward<A>(
        ueo_loops<A>(capability()), args, parts.summary, parts.marginal, threads_for(view)));
  });
  return {loss, saved};
}

// The gradient times grad_loss, from what forward kept.
template <class A>
Tensor gradient(A grad_loss, const Tensor& logits, const Tensor& saved, double trade_off,
                double eps) {
  const LogitsView view = view_of(logits);
  Tensor grad = empty<2>(logits, {view.rows, view.columns}, logits.scalar_type());
  if (view.rows == 0) return grad;
  const Saved<const A> parts = parts_of<A>(saved, view);
  const int64_t bytes = view.rows * view.columns * static_cast<int64_t>(logits.element_size());
  const BackwardRows<A> args{view,
                             {trade_off, 1.0, eps},
                             grad_loss,
                             parts.row_stats,
                             nullptr,
                             parts.summary[kConfidenceSum],
                             parts.summary[kMarginalWeightSum],
                             grad.mutable_data_ptr(),
                             bytes >= tuning::kStreamBytes};
  ueo_backward<A>(ueo_loops<A>(capability()), args, parts.marginal, threads_for(view));
  return grad;
}

Tensor ueo_loss_backward(const Tensor& grad_loss, const Tensor& any_logits, const Tensor& saved,
                         double trade_off, double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  check_saved(logits, grad_loss, saved);
  return with_compute_type(storage_of(logits), [&](auto type) {
    using A = decltype(type);
    return gradient<A>(*grad_loss.const_data_ptr<A>(), logits, saved, trade_off, eps);
  });
}

std::tuple<Tensor, Tensor, Tensor> ueo_loss_and_grad(const Tensor& any_logits,
                                                     const std::optional<Tensor>& confidence,
                                                     const std::optional<Tensor>& marginal_weights,
                                                     double trade_off, double confidence_scale,
                                                     double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  const auto [loss, saved] =
      ueo_loss_forward(logits, confidence, marginal_weights, trade_off, confidence_scale, eps);
  Tensor grad = with_compute_type(storage_of(logits), [&, &saved = saved](auto type) {
    return gradient<decltype(type)>(1, logits, saved, trade_off, eps);
  });
  return {loss, saved, grad};
}

Tensor max_softmax_cpu(const Tensor& cosines, double scale) {
  const Tensor logits = with_adjacent_columns(cosines, "cosines");
  const LogitsView view = view_of(logits);
  return with_compute_type(view.storage, [&](auto type) {
    using A = decltype(type);
    Tensor out = empty<1>(logits, {view.rows}, kComputeDtype<A>);
    max_softmax<A>(ueo_loops<A>(capability()), view, scale, out.mutable_data_ptr<A>(),
                   threads_for(view));
    return out;
  });
}

int64_t interface_number() { return kInterface; }

int64_t cpu_capability() { return static_cast<int64_t>(capability()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CPU, m) {
  m.impl("ueo_loss_forward", TORCH_BOX(&ueo_loss_forward));
  m.impl("ueo_loss_backward", TORCH_BOX(&ueo_loss_backward));
  m.impl("ueo_loss_and_grad", TORCH_BOX(&ueo_loss_and_grad));
  m.impl("max_softmax", TORCH_BOX(&max_softmax_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CompositeExplicitAutograd, m) {
  m.impl("interface_number", TORCH_BOX(&interface_number));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace ueo_fast::cpu
