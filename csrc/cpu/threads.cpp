#include "threads.h"

#include <torch/csrc/stable/ops.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "tuning.h"

namespace ueo_fast::cpu {
namespace {

bool in_forked_child = false;

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

void parallel_for(int64_t n, int64_t elements, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 1 || elements < tuning::kSerialElements || in_forked_child) {
    if (n > 0) body(0, n);
    return;
  }
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace ueo_fast::cpu
