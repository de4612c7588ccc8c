// Operands of the bf16 GEMMs: how they lie in memory, and how 32 of their values become 16 words of two bf16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace {

// An operand seen from outside in: element (i, k) lies at data[i * outer + k * inner], in elements of its dtype.
struct Operand {
  const void* data;
  int dtype;  // 0 fp32, 1 bf16
  int64_t outer, inner;
};

// 32 fp32 at p, as 16 words of two bf16.
inline __m512i pairs(const float* p) {
  const __m512i even_odd_low = _mm512_loadu_si512(p), even_odd_high = _mm512_loadu_si512(p + 16);
  const __m512i low = _mm512_srli_epi32(even_odd_low, 16), high = _mm512_srli_epi32(even_odd_high, 16);
  const __m256i a = _mm512_cvtepi32_epi16(low), b = _mm512_cvtepi32_epi16(high);
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

inline __m512i pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }

}  // namespace

#endif
