// Launches kernels on a GPU, for the storage type that a .cu file is compiled for. By nvcc only.
#pragma once

#include <cuda_runtime.h>

#include "../storage.h"
#include "device.cuh"
#include "launch.h"

namespace ueo_fast::cuda {
namespace {

template <class T>
inline constexpr Storage kStorageOf = Storage::kFloat;
template <>
inline constexpr Storage kStorageOf<double> = Storage::kDouble;
template <>
inline constexpr Storage kStorageOf<Half> = Storage::kHalf;
template <>
inline constexpr Storage kStorageOf<BFloat16> = Storage::kBFloat16;

// Launches on a stream until something fails, and remembers what.
struct CudaLauncher {
  cudaStream_t stream;
  int64_t shared_per_block;  // that the GPU allows
  cudaError_t error = cudaSuccess;

  template <class... P>
  void run(void (*kernel)(P...), const Grid& grid, const std::type_identity_t<P>&... arguments) {
    if (error != cudaSuccess) return;
    const int shared = static_cast<int>(grid.shared_bytes);
    constexpr int kWithoutOptIn = 48 << 10;
    if (shared > kWithoutOptIn) {
      // All that there is, not what this launch needs: another thread may be launching the same
      // kernel with more.
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_per_block));
      if (error != cudaSuccess) return;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
};

}  // namespace
}  // namespace ueo_fast::cuda
