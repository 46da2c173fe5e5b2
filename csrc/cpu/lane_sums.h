// Sums over a row that the compiler keeps in registers.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>

#include "tuning.h"

namespace {

using ueo_fast::cpu::tuning::kPad;

// kPad running sums. Spelled out because `omp simd reduction` without -fassociative-math ends in
// kPad dependent additions, which cost as much as 200 columns; a loop over the lanes inside a loop
// over the columns stays in registers and ends in a tree.
template <class A>
struct LaneSums {
  A lane[kPad] = {};

  double total() const {
    A part[kPad / 2];
    for (int64_t l = 0; l < kPad / 2; ++l) part[l] = lane[l] + lane[l + kPad / 2];
    for (int64_t l = 0; l < kPad / 4; ++l) part[l] += part[l + kPad / 4];
    return static_cast<double>(part[0] + part[2]) + static_cast<double>(part[1] + part[3]);
  }
};

}  // namespace
