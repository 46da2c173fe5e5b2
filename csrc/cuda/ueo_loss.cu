// Compiles the loss's kernels for one storage type (UEO_FAST_STORAGE) and launches them.
#include "launcher.cuh"
#include "ueo_loss_launch.cuh"

namespace ueo_fast::cuda {
namespace {

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
int max_softmax<kStorageOf<T>>(const Device& device, void* stream, const LogitsView& logits,
                               double scale, void* out) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream), device.shared_per_block};
  run_max_softmax<T>(launcher, device, logits, scale, out);
  return launcher.error;
}

}  // namespace ueo_fast::cuda
