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

std::tuple<Tensor, Tensor, Tensor, Tensor> ueo_loss_forward(
    const Tensor& any_logits, const std::optional<Tensor>& confidence,
    const std::optional<Tensor>& marginal_weights, double trade_off, double confidence_scale,
    double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  const LogitsView view = view_of(logits);
  return with_compute_type(view.storage, [&](auto type) {
    using A = decltype(type);
    constexpr ScalarType dtype = kComputeDtype<A>;
    Tensor loss = empty<0>(logits, {}, dtype);
    Tensor summary = empty<1>(logits, {kSummary}, dtype);
    Tensor marginal = empty<1>(logits, {view.columns}, dtype);
    Tensor row_stats = empty<2>(logits, {view.rows, kRowStats}, dtype);
    if (view.rows == 0) {
      torch::stable::zero_(loss);
      torch::stable::zero_(summary);
      torch::stable::zero_(marginal);
      return std::make_tuple(loss, summary, marginal, row_stats);
    }
    std::optional<Tensor> confidence_data;
    std::optional<Tensor> marginal_data;
    const ForwardRows<A> args{
        view,
        {trade_off, confidence_scale, eps},
        optional_weights<A>(confidence, confidence_data, view.rows, "confidence"),
        optional_weights<A>(marginal_weights, marginal_data, view.rows, "marginal_weights"),
        row_stats.mutable_data_ptr<A>()};
    *loss.mutable_data_ptr<A>() = static_cast<A>(
        ueo_forward<A>(ueo_loops<A>(capability()), args, summary.mutable_data_ptr<A>(),
                       marginal.mutable_data_ptr<A>(), threads_for(view)));
    return std::make_tuple(loss, summary, marginal, row_stats);
  });
}

// The gradient times grad_loss, from what forward returned.
template <class A>
Tensor gradient(A grad_loss, const Tensor& logits, const Tensor& summary, const Tensor& marginal,
                const Tensor& row_stats, double trade_off, double eps) {
  const LogitsView view = view_of(logits);
  Tensor grad = empty<2>(logits, {view.rows, view.columns}, logits.scalar_type());
  if (view.rows == 0) return grad;
  const A* totals = summary.const_data_ptr<A>();
  const int64_t bytes = view.rows * view.columns * static_cast<int64_t>(logits.element_size());
  const BackwardRows<A> args{view,
                             {trade_off, 1.0, eps},
                             grad_loss,
                             row_stats.const_data_ptr<A>(),
                             nullptr,
                             totals[kConfidenceSum],
                             totals[kMarginalWeightSum],
                             grad.mutable_data_ptr(),
                             bytes >= tuning::kStreamBytes};
  ueo_backward<A>(ueo_loops<A>(capability()), args, marginal.const_data_ptr<A>(),
                  threads_for(view));
  return grad;
}

Tensor ueo_loss_backward(const Tensor& grad_loss, const Tensor& any_logits, const Tensor& summary,
                         const Tensor& marginal, const Tensor& row_stats, double trade_off,
                         double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  check_saved(logits, grad_loss, summary, marginal, row_stats);
  return with_compute_type(storage_of(logits), [&](auto type) {
    using A = decltype(type);
    return gradient<A>(*grad_loss.const_data_ptr<A>(), logits, summary, marginal, row_stats,
                       trade_off, eps);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ueo_loss_and_grad(
    const Tensor& any_logits, const std::optional<Tensor>& confidence,
    const std::optional<Tensor>& marginal_weights, double trade_off, double confidence_scale,
    double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  const auto forward =
      ueo_loss_forward(logits, confidence, marginal_weights, trade_off, confidence_scale, eps);
  Tensor grad = with_compute_type(storage_of(logits), [&](auto type) {
    return gradient<decltype(type)>(1, logits, std::get<1>(forward), std::get<2>(forward),
                                    std::get<3>(forward), trade_off, eps);
  });
  return {std::get<0>(forward), std::get<1>(forward), std::get<2>(forward), grad};
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
