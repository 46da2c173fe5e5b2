// Tensors that ops return.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>

namespace ueo_fast {

// An uninitialised contiguous tensor on the device of `like`. It calls the
// allocator directly: torch::stable::new_empty looks the operator up by name, which costs as much as
// a small loss.
template <size_t kDims>
torch::stable::Tensor empty(const torch::stable::Tensor& like,
                            const std::array<int64_t, kDims>& sizes,
                            torch::headeronly::ScalarType dtype) {
  std::array<int64_t, kDims> strides{};
  int64_t stride = 1;
  for (size_t dim = kDims; dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      kDims, sizes.data(), strides.data(), static_cast<int32_t>(dtype), device_type, device_index,
      &handle));
  return torch::stable::Tensor(handle);
}

// An uninitialised tensor with the memory layout of `like`, which is dense.
inline torch::stable::Tensor empty_as(const torch::stable::Tensor& like) {
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      like.dim(), like.sizes().data(), like.strides().data(),
      static_cast<int32_t>(like.scalar_type()), device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace ueo_fast
