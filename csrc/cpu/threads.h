// Torch's threads, if they can run.
#pragma once

#include <cstdint>
#include <functional>

namespace ueo_fast::cpu {

// Calls body(first, last) on disjoint ranges that cover [0, n), on as many threads as it likes.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

// Splits [0, n) over torch's threads. Runs it on the calling thread if `elements` of work are too few
// to share, or in a forked child, where OpenMP's threads no longer exist and waiting for them would
// never end.
void parallel_for(int64_t n, int64_t elements, const std::function<void(int64_t, int64_t)>& body);

}  // namespace ueo_fast::cpu
