// Stores past the cache.
//
// Internal linkage throughout: see half.h.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Copies past the cache (whole cache lines; the ragged ends go through it).
inline void stream_copy(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
#if defined(__SSE2__)
  const int64_t misaligned = -reinterpret_cast<int64_t>(to) & 63;
  const int64_t head = misaligned < bytes ? misaligned : bytes;
  __builtin_memcpy(to, from, static_cast<size_t>(head));
  int64_t done = head;
  for (; done + 64 <= bytes; done += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
#elif defined(__AVX__)
    for (int64_t part = done; part < done + 64; part += 32) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + part));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + part), value);
    }
#else
    for (int64_t part = done; part < done + 64; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part), value);
    }
#endif
  }
  __builtin_memcpy(to + done, from + done, static_cast<size_t>(bytes - done));
#else
  __builtin_memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Streamed lines must be visible before another thread learns that they are there.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
