// Operands of the bf16 GEMMs: how they lie in memory, and how 32 of their values become 16 words of two bf16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace {

// An operand seen from outside in: element (i, k) lies at data[i * outer + k * inner], in elements of its dtype.
struct Operand {
  const void* data;
  int dtype;  // 0 fp32, 1 bf16
  int64_t outer, inner;
};

// 16 x 16 words, transposed in registers.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

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
