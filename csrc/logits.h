// Turns tensors into what kernels take: storage types, views, weights. The same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "tensors.h"
#include "ueo_loss.h"

namespace ueo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const Tensor& tensor, const char* name = "logits") {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "ueo_fast: ", name,
                      " must be float64, float32, float16 or bfloat16");
  }
}

// Logits whose rows are not adjacent elements are copied once: gathering them in the loops, a
// cache line per element, takes three times as long.
inline Tensor with_adjacent_columns(const Tensor& logits, const char* name = "logits") {
  check_logits(logits, name);
  const bool adjacent = logits.stride(1) == 1 || logits.size(1) == 1;
  return adjacent ? logits : torch::stable::contiguous(logits);
}

inline LogitsView view_of(const Tensor& logits) {
  return {logits.const_data_ptr(), storage_of(logits), logits.size(0), logits.size(1),
          logits.stride(0)};
}

// The compute type's version of a function template, chosen by the logits.
template <class F>
auto with_compute_type(Storage storage, F&& f) {
  return storage == Storage::kDouble ? f(double{}) : f(float{});
}

template <class A>
constexpr ScalarType kComputeDtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// The dtype of everything that is computed from the logits.
inline ScalarType dtype_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class A>
const A* optional_weights(const std::optional<Tensor>& weights, std::optional<Tensor>& contiguous,
                          int64_t rows, const char* name) {
  if (!weights) return nullptr;
  check_vector(*weights, rows, name, kComputeDtype<A>);
  contiguous = torch::stable::contiguous(*weights);
  return contiguous->template const_data_ptr<A>();
}

// The buffer of what forward keeps for backward, not filled in yet.
inline Tensor empty_saved(const Tensor& logits) {
  return empty<1>(logits, {Saved<float>::size(logits.size(0), logits.size(1))}, dtype_of(logits));
}

template <class A>
Saved<A> parts_of(Tensor& saved, const LogitsView& logits) {
  return {saved.mutable_data_ptr<A>(), logits.rows, logits.columns};
}

template <class A>
Saved<const A> parts_of(const Tensor& saved, const LogitsView& logits) {
  return {saved.const_data_ptr<A>(), logits.rows, logits.columns};
}

// Refuses a tensor that a backward pass would read beyond its end.
inline void check_saved(const Tensor& logits, const Tensor& grad_loss, const Tensor& saved) {
  const ScalarType dtype = dtype_of(logits);
  STD_TORCH_CHECK(grad_loss.dim() == 0 && grad_loss.scalar_type() == dtype,
                  "ueo_fast: grad_loss must be 0-d with the dtype of the loss");
  const int64_t size = Saved<float>::size(logits.size(0), logits.size(1));
  STD_TORCH_CHECK(saved.dim() == 1 && saved.size(0) == size && saved.scalar_type() == dtype &&
                      saved.is_contiguous(),
                  "ueo_fast: saved must be that of ueo_loss_forward: ", size,
                  " adjacent numbers in the dtype of the loss");
  check_memory(grad_loss, "grad_loss");
  check_memory(saved, "saved");
}

}  // namespace ueo_fast
