// The version of what Python and the libraries, _cpu.so and _cuda.so, ask of each other.
#pragma once

#include <cstdint>

namespace ueo_fast {

// Raised together with INTERFACE in ueo_fast/_extension.py whenever a schema, the meaning of a tensor
// that ops hand to each other, or a check that Python leaves to an op changes: a stale binary is then
// told apart.
inline constexpr int64_t kInterface = 6;

}  // namespace ueo_fast
