// Compiles the kernels of channel_affine for one storage type (UEO_FAST_STORAGE) and launches them.
#include "channel_affine_launch.cuh"
#include "launcher.cuh"

namespace ueo_fast::cuda {

using T = UEO_FAST_STORAGE;

template <>
int channel_affine_forward<kStorageOf<T>>(const Device& device, void* stream,
                                          const AffineForwardCall& call) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_channel_affine<T>(launcher, device, call);
  return launcher.error;
}

template <>
int channel_affine_backward<kStorageOf<T>>(const Device& device, void* stream,
                                           const AffineBackwardCall& call) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_channel_affine_gradient<T>(launcher, device, call);
  return launcher.error;
}

}  // namespace ueo_fast::cuda
