// The elementary functions and conversions of csrc/cpu, compiled once per instruction set like the
// loops that use them, so that tests can measure their errors.
#include <cstdint>
#include <cstring>

#include "half.h"
#include "simd_math.h"

namespace {

// 2^x for x <= 0, a register at a time; the last one padded with zeros.
template <class A>
void exp2_registers(const A* in, A* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const size_t bytes = sizeof(A) * static_cast<size_t>(n - i < kLanes<A> ? n - i : kLanes<A>);
    A lanes[kLanes<A>] = {};
    std::memcpy(lanes, in + i, bytes);
    store<A>(exp2_minus(-load(lanes), A(1)), lanes);
    std::memcpy(out + i, lanes, bytes);
  }
}

}  // namespace

#define UEO_FAST_CONCATENATE(a, b) a##b
#define UEO_FAST_NAME(base, level) UEO_FAST_CONCATENATE(base, level)
#define UEO_FAST_DEFINE(name, In, Out, statement)                              \
  void UEO_FAST_NAME(name, UEO_FAST_LEVEL)(const void* x, void* y, int64_t n) { \
    const In* in = static_cast<const In*>(x);                                  \
    Out* out = static_cast<Out*>(y);                                           \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) statement;             \
  }

#define UEO_FAST_DEFINE_EXP2(name, A)                                          \
  void UEO_FAST_NAME(name, UEO_FAST_LEVEL)(const void* x, void* y, int64_t n) { \
    exp2_registers(static_cast<const A*>(x), static_cast<A*>(y), n);           \
  }

UEO_FAST_DEFINE_EXP2(exp2_float_, float)
UEO_FAST_DEFINE_EXP2(exp2_double_, double)
UEO_FAST_DEFINE(log_float_, float, float, out[i] = log_nonnegative(in[i]))
UEO_FAST_DEFINE(log_double_, double, double, out[i] = log_nonnegative(in[i]))
UEO_FAST_DEFINE(half_to_float_, Half, float, out[i] = to_float(in[i]))
UEO_FAST_DEFINE(float_to_half_, float, Half, from_float(in[i], out[i]))
UEO_FAST_DEFINE(bfloat16_to_float_, BFloat16, float, out[i] = to_float(in[i]))
UEO_FAST_DEFINE(float_to_bfloat16_, float, BFloat16, from_float(in[i], out[i]))
