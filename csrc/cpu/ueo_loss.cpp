// The loss's CPU ops: tensors in, tensors out, around the driver.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "../tensors.h"
#include "threads.h"
#include "tuning.h"
#include "ueo_loss_driver.h"

namespace ueo_fast::cpu {
namespace {

// Raised together with INTERFACE in ueo_fast/_extension.py whenever a schema, or the meaning of a
// tensor that ops hand to each other, changes: a stale binary is then told apart.
constexpr int64_t kInterface = 1;

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Storage storage_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "ueo_fast: logits must be float64, float32, float16 or bfloat16");
  }
}

// Logits whose rows are not adjacent elements are copied once: gathering them in the loops, a
// cache line per element, takes three times as long.
Tensor with_adjacent_columns(const Tensor& logits) {
  check_logits(logits);
  const bool adjacent = logits.stride(1) == 1 || logits.size(1) == 1;
  return adjacent ? logits : torch::stable::contiguous(logits);
}

LogitsView view_of(const Tensor& logits) {
  return {logits.const_data_ptr(), storage_of(logits), logits.size(0), logits.size(1),
          logits.stride(0)};
}

ParallelFor threads_for(const LogitsView& logits) {
  return [elements = logits.rows * logits.columns](int64_t n, const auto& body) {
    parallel_for(n, elements, body);
  };
}

// The compute type's version of a function template, chosen by the logits.
template <class F>
auto with_compute_type(Storage storage, F&& f) {
  return storage == Storage::kDouble ? f(double{}) : f(float{});
}

template <class A>
constexpr ScalarType kComputeDtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

template <class A>
const A* optional_weights(const std::optional<Tensor>& weights, std::optional<Tensor>& contiguous,
                          int64_t rows, const char* name) {
  if (!weights) return nullptr;
  check_vector(*weights, rows, name, kComputeDtype<A>);
  contiguous = torch::stable::contiguous(*weights);
  return contiguous->template const_data_ptr<A>();
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

Tensor ueo_loss_backward(const Tensor& grad_loss, const Tensor& any_logits, const Tensor& summary,
                         const Tensor& marginal, const Tensor& row_stats, double trade_off,
                         double eps) {
  const Tensor logits = with_adjacent_columns(any_logits);
  const LogitsView view = view_of(logits);
  return with_compute_type(view.storage, [&](auto type) {
    using A = decltype(type);
    constexpr ScalarType dtype = kComputeDtype<A>;
    STD_TORCH_CHECK(grad_loss.dim() == 0 && grad_loss.scalar_type() == dtype,
                    "ueo_fast: grad_loss must be 0-d with the dtype of the loss");
    check_vector(summary, kSummary, "summary", dtype);
    check_vector(marginal, view.columns, "marginal", dtype);
    STD_TORCH_CHECK(row_stats.dim() == 2 && row_stats.size(0) == view.rows &&
                        row_stats.size(1) == kRowStats && row_stats.scalar_type() == dtype &&
                        row_stats.is_contiguous() && summary.is_contiguous() &&
                        marginal.is_contiguous(),
                    "ueo_fast: row_stats, summary and marginal must be those of ueo_loss_forward");
    Tensor grad = empty<2>(logits, {view.rows, view.columns}, logits.scalar_type());
    if (view.rows == 0) return grad;
    const A* totals = summary.const_data_ptr<A>();
    const int64_t bytes = view.rows * view.columns * static_cast<int64_t>(logits.element_size());
    const BackwardRows<A> args{view,
                               {trade_off, 1.0, eps},
                               *grad_loss.const_data_ptr<A>(),
                               row_stats.const_data_ptr<A>(),
                               nullptr,
                               totals[kConfidenceSum],
                               totals[kMarginalWeightSum],
                               grad.mutable_data_ptr(),
                               bytes >= tuning::kStreamBytes};
    ueo_backward<A>(ueo_loops<A>(capability()), args, marginal.const_data_ptr<A>(),
                    threads_for(view));
    return grad;
  });
}

Tensor max_softmax_cpu(const Tensor& any_logits, double scale) {
  const Tensor logits = with_adjacent_columns(any_logits);
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
  m.impl("max_softmax", TORCH_BOX(&max_softmax_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CompositeExplicitAutograd, m) {
  m.impl("interface_number", TORCH_BOX(&interface_number));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace ueo_fast::cpu
