// The elementary functions and conversions of csrc/cpu, compiled once per instruction set like the
// loops that use them, so that tests can measure their errors.
#include <cstdint>

#include "half.h"
#include "simd_math.h"

#define UEO_FAST_CONCATENATE(a, b) a##b
#define UEO_FAST_NAME(base, level) UEO_FAST_CONCATENATE(base, level)
#define UEO_FAST_DEFINE(name, In, Out, statement)                              \
  void UEO_FAST_NAME(name, UEO_FAST_LEVEL)(const void* x, void* y, int64_t n) { \
    const In* in = static_cast<const In*>(x);                                  \
    Out* out = static_cast<Out*>(y);                                           \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) statement;             \
  }

UEO_FAST_DEFINE(exp2_float_, float, float, out[i] = exp2_clamped(in[i]))
UEO_FAST_DEFINE(exp2_double_, double, double, out[i] = exp2_clamped(in[i]))
UEO_FAST_DEFINE(log_float_, float, float, out[i] = log_nonnegative(in[i]))
UEO_FAST_DEFINE(log_double_, double, double, out[i] = log_nonnegative(in[i]))
UEO_FAST_DEFINE(half_to_float_, Half, float, out[i] = to_float(in[i]))
UEO_FAST_DEFINE(float_to_half_, float, Half, from_float(in[i], out[i]))
UEO_FAST_DEFINE(bfloat16_to_float_, BFloat16, float, out[i] = to_float(in[i]))
UEO_FAST_DEFINE(float_to_bfloat16_, float, BFloat16, from_float(in[i], out[i]))
