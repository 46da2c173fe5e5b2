// Which instruction set the loops use.
#pragma once

#include <cstdint>

namespace ueo_fast::cpu {

enum class Capability : int64_t { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one that this machine can run.
Capability supported_capability();

// The one in use: supported_capability(), or what the environment variable
// UEO_FAST_CPU_CAPABILITY (base, avx2 or avx512) names where that is lower. Read once.
Capability capability();

}  // namespace ueo_fast::cpu
