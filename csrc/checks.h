// What every op asks of its arguments. Users meet the friendlier errors of
// ueo_fast/functional.py first; these keep a direct call of torch.ops.ueo_fast from reading memory
// that is not there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace ueo_fast {

inline void check_logits(const torch::stable::Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "ueo_fast: logits must have shape (B, C), got ", logits.dim(),
                  " dimensions");
  STD_TORCH_CHECK(logits.size(1) > 0, "ueo_fast: logits must have at least one class, got C = 0");
}

inline void check_vector(const torch::stable::Tensor& tensor, int64_t length, const char* name,
                         torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, "ueo_fast: ", name,
                  " must have shape (", length, ",)");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "ueo_fast: ", name,
                  " must have the compute dtype of the logits (float64 for float64, else float32)");
}

}  // namespace ueo_fast
