// Launches kernels on a GPU, for the storage type that a .cu file is compiled for. By nvcc only.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

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

// Lets a kernel have all the shared memory of the current GPU: not what one launch needs, as
// another thread may be launching the same kernel with more. Asked once per kernel and GPU: the
// driver's answer takes as long as a launch.
inline cudaError_t opt_in_once(const void* kernel, int shared_per_block) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (done.count({kernel, device}) > 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block);
  if (error == cudaSuccess) done.insert({kernel, device});
  return error;
}

// Launches on a stream until something fails, and keeps the first error.
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
      error = opt_in_once(reinterpret_cast<const void*>(kernel),
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
