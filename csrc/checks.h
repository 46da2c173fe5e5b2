// The checks that every op makes of its arguments. Users see the friendlier errors of
// ueo_fast/functional.py first; these keep a direct call of torch.ops.ueo_fast from reading memory
// that does not exist.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace ueo_fast {

// Refuses a tensor whose storage ends before its elements do. Sharded training (FSDP) frees storages
// between uses with `untyped_storage().resize_(0)`, which leaves sizes and strides as they were.
inline void check_memory(const torch::stable::Tensor& tensor, const char* name) {
  int64_t last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 0) return;
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t needed = (last + 1) * static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(needed <= bytes, "ueo_fast: ", name, " needs ", needed,
                  " bytes of memory, but its storage holds ", bytes,
                  ": it was freed or shrunk (untyped_storage().resize_, as FSDP does between uses); "
                  "make the call while the tensor has its memory");
}

inline void check_logits(const torch::stable::Tensor& logits, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 2, "ueo_fast: ", name, " must have shape (B, C), got ",
                  logits.dim(), " dimensions");
  STD_TORCH_CHECK(logits.size(1) > 0, "ueo_fast: ", name,
                  " must have at least one class, got C = 0");
  check_memory(logits, name);
}

inline void check_vector(const torch::stable::Tensor& tensor, int64_t length, const char* name,
                         torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, "ueo_fast: ", name,
                  " must have shape (", length, ",)");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "ueo_fast: ", name,
                  " must have the compute dtype of the logits (float64 for float64, else float32)");
  check_memory(tensor, name);
}

}  // namespace ueo_fast
