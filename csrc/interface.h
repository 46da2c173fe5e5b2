// The version of the interface between Python and the libraries _cpu.so and _cuda.so.
#pragma once

#include <cstdint>

namespace ueo_fast {

// Raise it together with INTERFACE in ueo_fast/_extension.py whenever a schema changes, or the meaning
// of a tensor that ops pass to each other, or a check that Python leaves to an op. A stale binary is
// then recognised.
inline constexpr int64_t kInterface = 6;

}  // namespace ueo_fast
