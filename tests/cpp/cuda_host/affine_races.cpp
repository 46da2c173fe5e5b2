// The kernels of channel_affine and layer_norm under ThreadSanitizer, for the storage type that it is
// compiled for, as kernel_races.cpp; with "quick" a part of the cases. Prints each case before it runs.
#include <cstdio>
#include <random>
#include <string>

#include "affine_calls.h"

namespace cuda = ueo_fast::cuda;
using ueo_fast::ChannelLayout;
using ueo_fast::Storage;

namespace {

// Few blocks, so that threads walk over several periods.
cuda::Device device_with(int64_t shared_per_block) {
  return {1, 256, shared_per_block, 2 * shared_per_block, 1 << 20};
}

struct AffineCase {
  const char* what;
  ChannelLayout layout;
  bool quick = false;
};
constexpr AffineCase kAffine[] = {
    {"slots across channels, lines and steps", {90, 33, 5}, true},
    {"channels last, a last slot that is not whole", {75, 21, 1}},
    {"slots of one channel, runs across tiles", {5, 3, 1504}},
    {"one period, several tiles", {3, 700, 3}},
};

struct NormCase {
  const char* what;
  int64_t rows;
  int64_t columns;
  int64_t shared_per_block;
  bool quick = false;
};
constexpr NormCase kNorm[] = {
    {"lanes share a row", 150, 23, 227 << 10, true},
    {"a warp has a row", 40, 345, 227 << 10},
    {"a block has a row", 9, 1100, 227 << 10, true},
    {"hardly any shared memory", 9, 1100, 8 << 10},
};

template <class T>
std::vector<T> random_values(int64_t count) {
  static std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 3);
  std::vector<T> values(count);
  for (T& value : values) {
    value = cuda::to_storage<T>(static_cast<cuda::ComputeType<T>>(normal(random)));
  }
  return values;
}

template <class T>
void run(const AffineCase& test, Storage storage, bool) {
  using A = cuda::ComputeType<T>;
  const cuda::Device device = device_with(227 << 10);
  const int64_t count = test.layout.elements();
  const auto x = random_values<T>(count), residual = random_values<T>(count);
  const auto weight = random_values<A>(test.layout.channels);
  const auto bias = random_values<A>(test.layout.channels);
  const std::vector<A> var(test.layout.channels, A(2));
  const cuda::ChannelParameters parameters{
      {weight.data()}, {bias.data()}, {bias.data()}, {var.data()}, 1e-5};
  std::vector<T> out(count), grad(count);
  std::vector<A> grad_weight(test.layout.channels), grad_bias(test.layout.channels);
  std::vector<unsigned char> bits(ueo_fast::mask_bytes(count));
  cuda_host::Launcher launcher;
  cuda_host::Scratch workspace(cuda::affine_backward_workspace(device, test.layout, storage));
  cuda::run_channel_affine<T>(launcher, device,
                              {test.layout, x.data(), parameters, residual.data(), true,
                               out.data(), bits.data()});
  cuda::run_channel_affine_gradient<T>(
      launcher, device,
      {test.layout, residual.data(), x.data(), parameters, bits.data(), true, out.data(),
       {grad_weight.data()}, {grad_bias.data()}, grad.data(), workspace.memory.data()});
}

template <class T>
void run(const NormCase& test, Storage storage, bool quick) {
  using A = cuda::ComputeType<T>;
  const cuda::Device device = device_with(test.shared_per_block);
  const int64_t stride = test.columns + 1;  // rows at every alignment
  const auto x = random_values<T>(test.rows * stride);
  const auto grad_out = random_values<T>(test.rows * test.columns);
  const auto weight = random_values<A>(test.columns), bias = random_values<A>(test.columns);
  std::vector<T> out(test.rows * test.columns);
  std::vector<A> mean(test.rows), rstd(test.rows), sums(2 * test.columns);
  const cuda::NormRows rows{x.data(), test.rows, test.columns, stride};
  const cuda::NormRows grad_rows{grad_out.data(), test.rows, test.columns, test.columns};
  cuda_host::Launcher launcher;
  cuda_host::Scratch workspace(
      cuda::norm_backward_workspace(device, test.rows, test.columns, storage));
  cuda::run_layer_norm<T>(launcher, device,
                          {rows, weight.data(), bias.data(), 1e-5, out.data(), mean.data(),
                           rstd.data()});
  for (const cuda::NormRows& of_grad : {grad_rows, rows}) {  // aligned differently, and alike
    cuda::run_layer_norm_gradient<T>(launcher, device,
                                     {of_grad, rows, mean.data(), rstd.data(), weight.data(),
                                      out.data(), sums.data(), workspace.memory.data()});
    // The kernel that adds the sums of so many columns starts 35,000 threads, half a minute's work.
    if (quick && test.columns > 1000) break;
  }
}

template <class Case>
void run_all(const Case& test, bool quick) {
  if (quick && !test.quick) return;
  std::printf("%s\n", test.what);
  std::fflush(stdout);
  run<UEO_FAST_STORAGE>(test, Storage::UEO_FAST_STORAGE_NAME, quick);
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  for (const AffineCase& test : kAffine) run_all(test, quick);
  for (const NormCase& test : kNorm) run_all(test, quick);
  return 0;
}
