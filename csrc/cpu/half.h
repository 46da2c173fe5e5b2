// float16 and bfloat16 as bit patterns, converted in loops that every compiler vectorises.
// Rounding is to nearest, ties to even; NaN stays NaN; overflow goes to infinity.
//
// Included by sources that are compiled once per instruction set: everything here has internal
// linkage, so that the linker cannot pick one instruction set's copy for all of them.
#pragma once

#include <cstdint>

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // the exponent re-biased
  // 2^-14 + magnitude * 2^-24, less 2^-14: no subnormal float that a flush mode could take.
  const float shifted = __builtin_bit_cast(float, (magnitude << 13) + (113u << 23)) - 0x1p-14f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return __builtin_bit_cast(float, sign | (magnitude >= 0x7c00u ? special : finite));
}

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

inline void from_float(float value, BFloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline void from_float(float value, Half& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the adder do the rounding of a result that is subnormal in float16.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  out.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

inline void from_float(float value, float& out) { out = value; }
inline void from_float(double value, double& out) { out = value; }

}  // namespace
