// The mask of a relu, eight elements to a byte: csrc/channel_affine.h.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>

#include "half.h"
#include "tuning.h"

namespace {

using ueo_fast::cpu::tuning::kAffineTile;

// The bits of an element. Read through a pointer: GCC 12 crashes on a loop of bit casts to and from
// a struct of 16 bits.
template <class S>
struct PatternOf {
  using type = uint16_t;
};
template <>
struct PatternOf<float> {
  using type = uint32_t __attribute__((may_alias));
};
template <>
struct PatternOf<double> {
  using type = uint64_t __attribute__((may_alias));
};

// The mask of what a relu stored: positive numbers, NaN, and +0, the only one whose bits are all zero.
template <class S>
inline void pack_mask(const S* relu, int64_t n, uint8_t* bits) {
  const auto* patterns = reinterpret_cast<const typename PatternOf<S>::type*>(relu);
  uint8_t set[kAffineTile];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) set[j] = patterns[j] != 0;
  for (int64_t j = n; j % 8 != 0; ++j) set[j] = 0;
  for (int64_t byte = 0; byte < (n + 7) / 8; ++byte) {
    uint64_t eight;
    __builtin_memcpy(&eight, set + 8 * byte, 8);
    // Bit 8 i moves to bit 56 + i; no two of the products meet.
    bits[byte] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

// out = values where the mask is set, else 0.
template <class S>
inline void apply_mask(const S* values, const uint8_t* bits, int64_t n, S* out) {
  using Pattern = typename PatternOf<S>::type;
  const Pattern* __restrict from = reinterpret_cast<const Pattern*>(values);
  Pattern* __restrict to = reinterpret_cast<Pattern*>(out);
  uint8_t set[kAffineTile];
  for (int64_t byte = 0; byte < (n + 7) / 8; ++byte) {
    const uint64_t spread = (bits[byte] * 0x0101010101010101u) & 0x8040201008040201u;
    __builtin_memcpy(set + 8 * byte, &spread, 8);
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = set[j] != 0 ? from[j] : 0;
}

}  // namespace
