// 2^t on registers, and log as plain arithmetic, so that a loop around it is vectorised at every
// instruction set. tests/loss/test_cpu_loops.py bounds their errors.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr double kLn2 = 0.6931471805599453;

template <class A>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // few bits: k * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kBias = 127.0f;  // of the exponent field
  static constexpr Bits kOne = 0x3f800000u;
  static constexpr Bits kSqrtHalf = 0x3f3504f3u;
  // (2^r - 1) / r on |r| <= 1/2: least maximum error of 2^r (Lawson's iteration), 9.2e-8.
  static inline Vector<float> exp2_slope(Vector<float> r) {
    Vector<float> p = 0.001326472707f * r + 0.009671512649f;
    p = p * r + 0.05550733744f;
    p = p * r + 0.2402224209f;
    return p * r + 0.6931469776f;
  }
  // The even series of log((1 + s) / (1 - s)) / s - 2 in z = s^2 (FreeBSD msun e_logf).
  static inline float log_tail(float z) {
    float p = 0.24279078841f;
    p = p * z + 0.28498786688f;
    p = p * z + 0.40000972152f;
    p = p * z + 0.66666662693f;
    return p * z;
  }
};

template <>
struct FloatTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kBias = 1023.0;
  static constexpr Bits kOne = 0x3ff0000000000000u;
  static constexpr Bits kSqrtHalf = 0x3fe6a09e667f3bcdu;
  // (2^r - 1) / r on |r| <= 1/2: Taylor's ln(2)^k / k!, the first term left out below 2^-57.
  static inline Vector<double> exp2_slope(Vector<double> r) {
    Vector<double> p = 1.3691488853904128e-12 * r + 2.5678435993488206e-11;
    p = p * r + 4.4455382718708116e-10;
    p = p * r + 7.0549116208011233e-09;
    p = p * r + 1.0178086009239699e-07;
    p = p * r + 1.3215486790144307e-06;
    p = p * r + 1.5252733804059841e-05;
    p = p * r + 1.5403530393381610e-04;
    p = p * r + 1.3333558146428443e-03;
    p = p * r + 9.6181291076284772e-03;
    p = p * r + 5.5504108664821580e-02;
    p = p * r + 2.4022650695910072e-01;
    return p * r + 6.9314718055994531e-01;
  }
  // FreeBSD msun e_log.
  static inline double log_tail(double z) {
    double p = 1.479819860511658591e-01;
    p = p * z + 1.531383769920937332e-01;
    p = p * z + 1.818357216161805012e-01;
    p = p * z + 2.222219843214978396e-01;
    p = p * z + 2.857142874366239149e-01;
    p = p * z + 3.999999999940941908e-01;
    p = p * z + 6.666666666666735130e-01;
    return p * z;
  }
};

// The smaller of x and `limit`: finite for infinity, NaN for NaN.
template <class A>
inline Vector<A> at_most(Vector<A> limit, Vector<A> x) {
  return limit < x ? limit : x;
}

// The exponent at which exp2_minus(x, 1) gives 0, as a value that the compiler does not know: GCC
// compiles at_most to one instruction only if it cannot rewrite the comparison with a constant.
template <class A>
inline Vector<A> zero_exponent() {
  const volatile A value = FloatTraits<A>::kBias;
  return broadcast<A>(value);
}

// The same for exp_minus.
template <class A>
inline Vector<A> zero_distance() {
  const volatile A value = static_cast<A>(FloatTraits<A>::kBias * kLn2);
  return broadcast<A>(value);
}

// 2^(-scale * x) for 0 <= scale * x <= kBias or NaN. Exactly 1 at 0, and exactly 0 at kBias, so that
// a masked class has probability 0. Where the instruction set fuses multiplication and addition,
// the product is not rounded.
template <class A>
inline Vector<A> exp2_minus(Vector<A> x, A scale) {
  using T = FloatTraits<A>;
  using Bits = typename VectorOf<A>::Bits;
  constexpr A kBiasedRound = T::kRound + T::kBias;
  const Vector<A> rounded = kBiasedRound - x * scale;
  const Vector<A> r = -(x * scale) - (rounded - kBiasedRound);
  // The biased integer part is in the low bits of `rounded`: shifted, it is 2^n. It is multiplied,
  // not added to the exponent field, so that every NaN stays NaN; with r, while the polynomial is
  // still being computed.
  const Vector<A> power = (Vector<A>)((Bits)rounded << T::kMantissa);
  return T::exp2_slope(r) * (r * power) + power;
}

#if defined(__AVX2__)
#define UEO_FAST_EIGHTHS                                                                  \
  0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u, 0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, \
      0x3f7ac0c7u

// The bits of 2^(j / 8), less j << 20, for the last three bits j of each lane of `index`.
inline VectorOf<float>::Bits eighths(VectorOf<float>::Bits index) {
  using Bits = VectorOf<float>::Bits;
#if defined(__AVX512F__)
  const Bits table = {UEO_FAST_EIGHTHS, UEO_FAST_EIGHTHS};
  // Masked, because GCC 12 warns about the plain intrinsic in its own header.
  return (Bits)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)index, (__m512i)table);
#else
  const Bits table = {UEO_FAST_EIGHTHS};
  return (Bits)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#endif
}

// As above, with the eight values of 2^(j / 8) in a register: on |r| <= 1/16 two fewer
// terms are needed, and the processor's multipliers are its busiest units.
inline Vector<float> exp2_minus(Vector<float> x, float scale) {
  using T = FloatTraits<float>;
  using Bits = VectorOf<float>::Bits;
  constexpr float kRound = T::kRound / 8;  // adding it rounds to a multiple of 1/8
  const Vector<float> rounded = kRound - x * scale;
  const Vector<float> r = -(x * scale) - (rounded - kRound);
  // The low bits of `rounded` are 8 n + j. The permutation looks at j alone. Shifted, they are n in
  // the exponent field and j << 20 below it, which the table has subtracted.
  const Bits bits = (Bits)rounded;
  const Vector<float> power = (Vector<float>)((bits << (T::kMantissa - 3)) + eighths(bits));
  // (2^r - 1) / r on |r| <= 1/16: least maximum error of 2^r (Lawson's iteration), 2.7e-8.
  Vector<float> p = 0.055496223f * r + 0.24025764f;
  p = p * r + 0.69314724f;
  return p * (r * power) + power;
}
#endif

// exp(-d) for 0 <= d <= zero_distance() or NaN.
template <class A>
inline Vector<A> exp_minus(Vector<A> d) {
  return exp2_minus(d, FloatTraits<A>::kLog2e);
}

// log(x) for x >= 0 or NaN; below the smallest normal number (0 included) the log of that number,
// so that 0 * log(0) is 0.
template <class A>
inline A log_nonnegative(A x) {
  using T = FloatTraits<A>;
  using Bits = typename T::Bits;
  const A tiny = std::numeric_limits<A>::min();
  const A clamped = x < tiny ? tiny : x;
  const Bits bits = __builtin_bit_cast(Bits, clamped);
  const Bits biased = (bits + (T::kOne - T::kSqrtHalf)) >> T::kMantissa;
  const Bits exponent = biased - (T::kOne >> T::kMantissa);
  // Integer to floating point without a conversion instruction that AVX2 lacks.
  const A k = __builtin_bit_cast(A, exponent + __builtin_bit_cast(Bits, T::kRound)) - T::kRound;
  const A f = __builtin_bit_cast(A, bits - (exponent << T::kMantissa)) - A(1);
  const A s = f / (A(2) + f);
  const A half_square = A(0.5) * f * f;
  const A r = T::log_tail(s * s);
  const A result =
      k * T::kLn2High - ((half_square - (s * (half_square + r) + k * T::kLn2Low)) - f);
  return result + (x - x);  // NaN and infinity must not come out as a number
}

}  // namespace
