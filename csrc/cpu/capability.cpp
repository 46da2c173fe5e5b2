#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace ueo_fast::cpu {

Capability supported_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kBase;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Capability::kAvx512 : Capability::kAvx2;
#else
  return Capability::kBase;
#endif
}

Capability capability() {
  static const Capability chosen = [] {
    const char* value = std::getenv("UEO_FAST_CPU_CAPABILITY");
    const std::string_view name = value ? value : "";
    Capability wanted = Capability::kAvx512;
    if (name == "base") wanted = Capability::kBase;
    if (name == "avx2") wanted = Capability::kAvx2;
    return std::min(wanted, supported_capability());
  }();
  return chosen;
}

}  // namespace ueo_fast::cpu
