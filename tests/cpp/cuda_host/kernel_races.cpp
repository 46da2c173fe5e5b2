// Runs the loss's kernels under ThreadSanitizer for the storage type that it is compiled for
// (UEO_FAST_STORAGE, UEO_FAST_STORAGE_NAME), on shapes and devices that cover every path, or with
// "quick" some of them (a CUDA thread costs 0.2 ms here). Prints each case before it runs.
#include <cstdio>
#include <random>
#include <string>

#include "calls.h"

namespace cuda = ueo_fast::cuda;
using ueo_fast::LogitsView;
using ueo_fast::Storage;
using ueo_fast::UeoOptions;

namespace {

struct Case {
  const char* what;
  int64_t rows;
  int64_t columns;
  int64_t apart;  // elements between rows
  int64_t shared_per_block;
  bool given_weights;
  double eps;
  bool quick = false;
};

constexpr int64_t kLarge = 227 << 10;
// The kernels for any row take rows of double, long rows with options, rows that do not fit into shared
// memory, and gradients of short rows whose logits are not contiguous.
constexpr Case kCases[] = {
    {"lanes hold a row", 300, 23, 0, kLarge, false, 0, true},
    {"lanes hold a row, with eps and weights", 70, 345, 1, kLarge, true, 1e-5},
    {"a block holds a row", 11, 1100, 1, kLarge, false, 0, true},
    {"many slots per thread", 9, 16500, 0, kLarge, false, 0},
    {"a launch of its own for the weights", 4100, 5, 0, kLarge, true, 0},
    {"any row", 37, 1100, 1, kLarge, true, 1e-5, true},
    {"any row, a part of it in shared memory", 37, 1100, 1, 12 << 10, true, 0},
    {"any row, hardly any shared memory", 9, 1100, 1, 8 << 10, false, 0},
};

template <class T>
void run(const Case& test, Storage storage) {
  using A = cuda::ComputeType<T>;
  // Few blocks: ThreadSanitizer can tell only so many threads of a launch apart.
  const cuda::Device device{1, 512, test.shared_per_block, 2 * test.shared_per_block, 1 << 20};
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 3);
  const int64_t stride = test.columns + test.apart;
  std::vector<T> logits(test.rows * stride);
  for (T& z : logits) z = cuda::to_storage<T>(static_cast<A>(normal(random)));
  std::vector<A> weights(test.rows, A(0.5));
  std::vector<A> summary(ueo_fast::kSummary), marginal(test.columns), loss(1), grad_loss(1, A(1)),
      row_stats(test.rows * ueo_fast::kRowStats), scores(test.rows);
  std::vector<T> grad(test.rows * test.columns);
  const LogitsView view{logits.data(), storage, test.rows, test.columns, stride};
  const UeoOptions options{0.7, test.given_weights ? 1.0 : 0.5, test.eps};
  const void* given = test.given_weights ? weights.data() : nullptr;

  cuda_host::Launcher launcher;
  cuda_host::Scratch workspace(cuda::forward_workspace(device, view));
  cuda::ForwardCall forward{view,           options,         given,
                            given,          loss.data(),     summary.data(),
                            marginal.data(), row_stats.data(), workspace.memory.data()};
  cuda::run_forward<T>(launcher, device, forward);
  cuda::run_backward<T>(launcher, device,
                        {view, options, grad_loss.data(), summary.data(), marginal.data(),
                         row_stats.data(), grad.data()});
  cuda::run_max_softmax<T>(launcher, device, view, 0.5, scores.data());
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  for (const Case& test : kCases) {
    if (quick && !test.quick) continue;
    std::printf("%s\n", test.what);
    std::fflush(stdout);
    run<UEO_FAST_STORAGE>(test, Storage::UEO_FAST_STORAGE_NAME);
  }
  return 0;
}
