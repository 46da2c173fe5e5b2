// The sample kernels under ThreadSanitizer, with the mistake planted whose number is the argument:
// with 0 nothing may be reported, else a data race must be.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "launcher.h"
#include "samples.cuh"

namespace samples = ueo_fast::cuda::samples;

namespace {

constexpr unsigned kBlocks = 3;
constexpr unsigned kThreads = 64;

bool expect(const char* what, float got, float expected) {
  if (got == expected || samples::planted != 0) return true;
  std::printf("%s: %g instead of %g\n", what, got, expected);
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  samples::planted = count > 1 ? std::atoi(arguments[1]) : 0;
  cuda_host::Launcher launcher;
  std::vector<float> x(4 * kBlocks * kThreads);
  for (unsigned i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  std::vector<float> out(x.size());
  std::vector<float> between(kBlocks);
  const size_t shared = 16 * kThreads;
  bool right = true;
  for (int round = 0; round < 3; ++round) {
    launcher.run(samples::block_sum, cuda_host::Grid{kBlocks, kThreads, shared}, x.data(),
                 out.data());
    right &= expect("block_sum", out[0], kThreads * (kThreads - 1) / 2);

    launcher.run(samples::rotate_warps, cuda_host::Grid{1, kThreads, shared}, x.data(), out.data());
    right &= expect("rotate_warps", out[31], 0);

    unsigned finished = 0;
    launcher.run(samples::sum_of_blocks, cuda_host::Grid{kBlocks, kThreads, shared}, x.data(),
                 between.data(), &finished, out.data());
    right &= expect("sum_of_blocks", out[0], 3);

    launcher.run(samples::copy_and_rotate, cuda_host::Grid{1, kThreads, shared}, x.data(),
                 out.data());
    right &= expect("copy_and_rotate", out[0], 4);
  }
  return right ? 0 : 1;
}
