// The CUDA ops of layer_norm: tensors in, tensors out, around the kernels. Nothing here waits for
// the GPU.
#include "layer_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../logits.h"
#include "../tensors.h"
#include "gpu.h"

namespace ueo_fast::cuda {
namespace {

// Rows whose columns are not adjacent are copied once.
Tensor checked_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, "ueo_fast: ", name, " must have shape (rows, columns), got ",
                  x.dim(), " dimensions");
  STD_TORCH_CHECK(x.size(1) <= std::numeric_limits<int>::max() / 2,
                  "ueo_fast: the CUDA kernels take up to 2^30 columns, got ", x.size(1));
  check_memory(x, name);
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

NormRows rows_of(const Tensor& x) {
  return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0)};
}

// `count` numbers in the compute dtype of x, adjacent.
Tensor checked_numbers(const Tensor& x, const Tensor& numbers, int64_t count, const char* name) {
  check_on_gpu_of(x, numbers, name);
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == count, "ueo_fast: ", name,
                  " must have shape (", count, ",)");
  STD_TORCH_CHECK(numbers.scalar_type() == dtype_of(x), "ueo_fast: ", name,
                  " must have the compute dtype of x (float64 for float64, else float32)");
  check_memory(numbers, name);
  return torch::stable::contiguous(numbers);
}

std::optional<Tensor> checked_numbers(const Tensor& x, const std::optional<Tensor>& numbers,
                                      const char* name) {
  if (!numbers) return std::nullopt;
  return checked_numbers(x, *numbers, x.size(1), name);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& any_x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, double eps) {
  const Storage storage = storage_of(any_x, "x");
  const OnGpuOf gpu(any_x);
  const Tensor x = checked_rows(any_x, "x");
  const std::optional<Tensor> weights = checked_numbers(x, weight, "weight");
  const std::optional<Tensor> biases = checked_numbers(x, bias, "bias");
  Tensor out = empty<2>(x, {x.size(0), x.size(1)}, x.scalar_type());
  Tensor mean = empty<1>(x, {x.size(0)}, dtype_of(x));
  Tensor rstd = empty<1>(x, {x.size(0)}, dtype_of(x));
  if (x.size(0) == 0 || x.size(1) == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
    return {out, mean, rstd};
  }
  const NormForwardCall call{rows_of(x),
                             data_of(weights),
                             data_of(biases),
                             eps,
                             out.mutable_data_ptr(),
                             mean.mutable_data_ptr(),
                             rstd.mutable_data_ptr()};
  check(with_storage(storage, [&]<Storage kStorage>() {
    return layer_norm_forward<kStorage>(gpu.device, gpu.stream, call);
  }));
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor> backward(const Tensor& any_grad_out, const Tensor& any_x,
                                    const Tensor& any_mean, const Tensor& any_rstd,
                                    const std::optional<Tensor>& weight, bool needs_x,
                                    bool needs_sums) {
  const Storage storage = storage_of(any_x, "x");
  const OnGpuOf gpu(any_x);
  const Tensor x = checked_rows(any_x, "x");
  const int64_t rows = x.size(0);
  const int64_t columns = x.size(1);
  check_on_gpu_of(x, any_grad_out, "grad_out");
  const Tensor grad_out = checked_rows(any_grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.size(0) == rows && grad_out.size(1) == columns &&
                      grad_out.scalar_type() == x.scalar_type(),
                  "ueo_fast: grad_out must have the shape and dtype of x");
  const Tensor mean = checked_numbers(x, any_mean, rows, "mean");
  const Tensor rstd = checked_numbers(x, any_rstd, rows, "rstd");
  const std::optional<Tensor> weights = checked_numbers(x, weight, "weight");
  Tensor grad_x = needs_x ? empty<2>(x, {rows, columns}, x.scalar_type())
                          : empty<1>(x, {0}, x.scalar_type());
  Tensor sums = needs_sums ? empty<2>(x, {2, columns}, dtype_of(x))
                           : empty<1>(x, {0}, dtype_of(x));
  if (rows == 0 || columns == 0) {
    if (needs_sums) torch::stable::zero_(sums);
    return {grad_x, sums};
  }
  if (!needs_x && !needs_sums) return {grad_x, sums};
  std::optional<Tensor> workspace;
  if (needs_sums) {
    const int64_t bytes = norm_backward_workspace(gpu.device, rows, columns, storage);
    workspace = empty<1>(x, {bytes}, ScalarType::Byte);
  }
  const NormBackwardCall call{rows_of(grad_out),
                              rows_of(x),
                              mean.const_data_ptr(),
                              rstd.const_data_ptr(),
                              data_of(weights),
                              needs_x ? grad_x.mutable_data_ptr() : nullptr,
                              needs_sums ? sums.mutable_data_ptr() : nullptr,
                              workspace ? workspace->mutable_data_ptr() : nullptr};
  check(with_storage(storage, [&]<Storage kStorage>() {
    return layer_norm_backward<kStorage>(gpu.device, gpu.stream, call);
  }));
  return {grad_x, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ueo_fast, CUDA, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&forward));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace ueo_fast::cuda
