// Philox4x32-10 (Salmon et al., SC 2011) for cast.cpp and accumulate.cpp; the layout of the counter is in
// runtime/numerics/random.py.
//
// With AVX-512 the words of 8 counters lie in the low halves of 64-bit lanes, where the multiplier reads them; what is in
// the high halves does not matter until the end. A round of 8 counters is 2 multiplications, 2 shuffles and 2 xors of
// three, so 16 words cost 30 instructions; several groups of 8 run side by side, since a round waits for the one before.

#ifndef LPCOMPILE_PHILOX_H
#define LPCOMPILE_PHILOX_H

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Mirrors RandomPlan in runtime/kernels/cpu/cast_library.py.
struct RandomPlan {
  uint32_t key[2];
  uint32_t high, step, stream;  // counter words 1 (to which the high half of the counter is added), 2 and 3
  int64_t offset;
};

#ifdef __AVX512F__

// The high half of each 64-bit lane in its low half. A shuffle, since shifts wait for the port of the multiplications.
inline __m512i high_half(__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDBB); }

// c[g][w], low halves: word w of the eight counters n[g].
template <int Groups>
inline void philox_rounds(const RandomPlan& plan, const __m512i n[Groups], __m512i c[Groups][4]) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  uint32_t k0 = plan.key[0], k1 = plan.key[1];
  // the first round: step and stream are the same for all counters
  const uint64_t p1 = uint64_t(plan.step) * 0xCD9E8D57u;
#pragma GCC unroll 4
  for (int g = 0; g < Groups; ++g) {
    const __m512i p0 = _mm512_mul_epu32(n[g], m0);
    const __m512i above = _mm512_add_epi32(high_half(n[g]), _mm512_set1_epi64(plan.high));
    c[g][0] = _mm512_xor_si512(above, _mm512_set1_epi64(uint32_t(p1 >> 32) ^ k0));
    c[g][1] = _mm512_set1_epi64(uint32_t(p1));
    c[g][2] = _mm512_xor_si512(high_half(p0), _mm512_set1_epi64(plan.stream ^ k1));
    c[g][3] = p0;
  }
#pragma GCC unroll 9
  for (int round = 1; round < 10; ++round) {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g) {
      const __m512i p0 = _mm512_mul_epu32(c[g][0], m0), q1 = _mm512_mul_epu32(c[g][2], m1);
      c[g][0] = _mm512_ternarylogic_epi64(high_half(q1), c[g][1], key0, 0x96);
      c[g][1] = q1;
      c[g][2] = _mm512_ternarylogic_epi64(high_half(p0), c[g][3], key1, 0x96);
      c[g][3] = p0;
    }
  }
}

// Words [4 first, 4 (first + count)) of the stream, in order; up to 124 words behind them are written as well.
__attribute__((noinline)) inline void philox(const RandomPlan& plan, int64_t first, int64_t count, uint32_t* words) {
  // the lanes that make a plain unpacking put four counters in order
  const __m512i lanes = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  for (int64_t i = 0; i < count; i += 32) {
    __m512i n[4], c[4][4];
    for (int g = 0; g < 4; ++g) n[g] = _mm512_add_epi64(_mm512_set1_epi64(first + i + 8 * g), lanes);
    philox_rounds<4>(plan, n, c);
    for (int g = 0; g < 4; ++g) {
      const __m512i w01 = _mm512_mask_shuffle_epi32(c[g][0], 0xaaaa, c[g][1], _MM_PERM_CCAA);
      const __m512i w23 = _mm512_mask_shuffle_epi32(c[g][2], 0xaaaa, c[g][3], _MM_PERM_CCAA);
      _mm512_storeu_si512(words + 4 * (i + 8 * g), _mm512_unpacklo_epi64(w01, w23));
      _mm512_storeu_si512(words + 4 * (i + 8 * g) + 16, _mm512_unpackhi_epi64(w01, w23));
    }
  }
}

#else

// Words [4 first, 4 (first + count)) of the stream, in order.
inline void philox(const RandomPlan& plan, int64_t first, int64_t count, uint32_t* __restrict words) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t n = uint64_t(first + i);
    uint32_t c0 = uint32_t(n), c1 = uint32_t(n >> 32) + plan.high, c2 = plan.step, c3 = plan.stream;
    uint32_t k0 = plan.key[0], k1 = plan.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

#endif
#endif
