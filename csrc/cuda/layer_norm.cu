// Compiles the kernels of layer_norm for one storage type (UEO_FAST_STORAGE) and launches them.
#include "launcher.cuh"
#include "layer_norm_launch.cuh"

namespace ueo_fast::cuda {

using T = UEO_FAST_STORAGE;

template <>
int layer_norm_forward<kStorageOf<T>>(const Device& device, void* stream,
                                      const NormForwardCall& call) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_layer_norm<T>(launcher, device, call);
  return launcher.error;
}

template <>
int layer_norm_backward<kStorageOf<T>>(const Device& device, void* stream,
                                       const NormBackwardCall& call) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_layer_norm_gradient<T>(launcher, device, call);
  return launcher.error;
}

}  // namespace ueo_fast::cuda
