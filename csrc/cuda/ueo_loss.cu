// Compiles the loss's kernels for one storage type (UEO_FAST_STORAGE) and launches them.
#include <cuda_runtime.h>

#include "ueo_loss_launch.cuh"

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
  void run(void (*kernel)(P...), const Grid& grid, P... arguments) {
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
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = grid.cooperative ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
};

using T = UEO_FAST_STORAGE;

}  // namespace

template <>
int ueo_forward<kStorageOf<T>>(const Device& device, void* stream, const ForwardCall& call) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_forward<T>(launcher, device, call);
  return launcher.error;
}

template <>
int ueo_backward<kStorageOf<T>>(const Device& device, void* stream, const BackwardCall& call) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_backward<T>(launcher, device, call);
  return launcher.error;
}

template <>
int ueo_one_pass<kStorageOf<T>>(const Device& device, void* stream, const ForwardCall& call,
                                void* grad) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_one_pass<T>(launcher, device, call, grad);
  return launcher.error;
}

template <>
int max_softmax<kStorageOf<T>>(const Device& device, void* stream, const LogitsView& logits,
                               double scale, void* out) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_max_softmax<T>(launcher, device, logits, scale, out);
  return launcher.error;
}

}  // namespace ueo_fast::cuda
