// What glue needs of the GPU that a tensor is on. Host code of the libraries' glue only.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <mutex>
#include <optional>

#include "../storage.h"
#include "launch.h"

namespace ueo_fast::cuda {

inline void check(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "ueo_fast: CUDA error ", error, ": ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline int attribute_of(int index, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, index));
  return value;
}

// Asked once per GPU: an attribute takes longer than a launch.
inline const Device& device_of(int index) {
  constexpr int kMost = 64;
  static std::array<std::optional<Device>, kMost> devices;
  static std::mutex mutex;
  STD_TORCH_CHECK(index >= 0 && index < kMost, "ueo_fast: no GPU number ", index, " is expected");
  const std::lock_guard lock(mutex);
  std::optional<Device>& device = devices[static_cast<size_t>(index)];
  if (!device) {
    device = Device{attribute_of(index, cudaDevAttrMultiProcessorCount),
                    attribute_of(index, cudaDevAttrMaxThreadsPerMultiProcessor),
                    attribute_of(index, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                    attribute_of(index, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                    attribute_of(index, cudaDevAttrL2CacheSize)};
  }
  return *device;
}

// Makes the tensor's GPU the current one, for as long as it lives; its properties and PyTorch's
// current stream on it.
struct OnGpuOf {
  int index;
  torch::stable::accelerator::DeviceGuard guard;
  const Device& device;
  void* stream = nullptr;

  explicit OnGpuOf(const torch::stable::Tensor& tensor)
      : index(tensor.get_device_index()), guard(index), device(device_of(index)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
};

// Calls f with the storage type as a template argument.
template <class F>
int with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::kFloat:
      return f.template operator()<Storage::kFloat>();
    case Storage::kDouble:
      return f.template operator()<Storage::kDouble>();
    case Storage::kHalf:
      return f.template operator()<Storage::kHalf>();
    default:
      return f.template operator()<Storage::kBFloat16>();
  }
}

inline void check_on_gpu_of(const torch::stable::Tensor& first, const torch::stable::Tensor& tensor,
                            const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(),
                  "ueo_fast: ", name, " must be on GPU ", first.get_device_index());
}

}  // namespace ueo_fast::cuda
