// Codes: the bits of grid values, and back, by arithmetic on the bits of fp32; the equations are those of
// runtime/numerics/codes.py.
//
//   encode   a normal value is its fp32 bits without the fraction bits that the format lacks, less a constant; below the
//            lowest binade, a + 2^23 quantum has a / quantum in its fraction
//   decode   the same backwards; below the lowest binade, an integer times the quantum
#pragma once

#include <cstdint>
#include <type_traits>

#include "bits.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Mirrors CodePlan in runtime/kernels/cpu/codes.py, field by field.
struct CodePlan {
  int32_t kind;           // 0 float, 1 integer, 2 table, 3 powers of two from 2^-127 on
  int32_t bits;           // of a code
  uint32_t shift;         // fraction bits of fp32 that the format lacks
  uint32_t offset;        // exponent of fp32 less that of the format, above the fraction bits that stay
  uint32_t first_normal;  // least magnitude that is no multiple of the quantum alone
  uint32_t special_from;  // least magnitude that is NaN or Inf
  uint32_t infinity;      // the magnitude of Inf, or more than all
  uint32_t nan_code, nan_sign, lone_nan;  // the magnitude of NaN, whether it has a sign; the whole code where it is but one
  float low, magic, quantum;              // of the lowest binade; quantum 0 where codes below first_normal mean 0
  int32_t zero, is_signed;                // integers
  int32_t count;                          // tables: how many values are finite
  float grid[64];                         // those, increasing, for up to 64
  int32_t code_of[64], minus_zero;        // their codes; that of -0, or of 0
  float values[256];                      // by code
};

#if defined(__AVX512F__) && defined(__AVX512DQ__)

inline void store_codes(uint8_t* to, __m512i codes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes)); }
inline void store_codes(uint16_t* to, __m512i codes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(codes)); }
inline void store_codes(int32_t* to, __m512i codes) { _mm512_storeu_si512(to, codes); }
inline void store_codes(int64_t* to, __m512i codes) {
  _mm512_storeu_si512(to, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(codes)));
  _mm512_storeu_si512(to + 8, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(codes, 1)));
}

// The first elements, sixteen at a time, where the compiler's own vectors are slow: how many are done.
template <class Code>
int64_t encode_vectors(const CodePlan& p, const float* from, Code* out, int64_t count) {
  const int64_t done = count & ~int64_t(15);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), nan = _mm512_set1_epi32(int(p.nan_code));
  if (p.kind == 0) {
    const __m512 low = _mm512_set1_ps(p.low), magic = _mm512_set1_ps(p.magic);
    const __m512i base = _mm512_castps_si512(magic), offset = _mm512_set1_epi32(int(p.offset));
    const __m128i shift = _mm_cvtsi32_si128(int(p.shift)), top = _mm_cvtsi32_si128(p.bits - 1);
    const __mmask16 has_nan_sign = p.nan_sign ? 0xffff : 0;
    for (int64_t i = 0; i < done; i += 16) {
      const __m512i bits = _mm512_loadu_si512(from + i), m = _mm512_and_si512(bits, magnitude);
      const __m512 a = _mm512_castsi512_ps(m);
      const __m512i small = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(a, magic)), base);
      __m512i code = _mm512_sub_epi32(_mm512_srl_epi32(m, shift), offset);
      code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(a, low, _CMP_LT_OQ), small);
      const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
      code = _mm512_mask_mov_epi32(code, is_nan, nan);
      const __m512i sign = _mm512_sll_epi32(_mm512_srli_epi32(bits, 31), top);
      store_codes(out + i, _mm512_mask_or_epi32(code, __mmask16(~is_nan | has_nan_sign), code, sign));
    }
    return done;
  }
  if (p.kind == 2 && p.count <= 16) {
    const __m512i code_of = _mm512_loadu_si512(p.code_of), minus_zero = _mm512_set1_epi32(p.minus_zero);
    for (int64_t i = 0; i < done; i += 16) {
      const __m512 v = _mm512_loadu_ps(from + i);
      __m512i index = _mm512_setzero_si512();
      for (int32_t at = 1; at < p.count; ++at)
        index = _mm512_mask_add_epi32(index, _mm512_cmp_ps_mask(v, _mm512_set1_ps(p.grid[at]), _CMP_GE_OQ), index, _mm512_set1_epi32(1));
      __m512i code = _mm512_permutexvar_epi32(index, code_of);
      code = _mm512_mask_mov_epi32(code, _mm512_fpclass_ps_mask(v, 4), minus_zero);  // of -0
      store_codes(out + i, _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan));
    }
    return done;
  }
  return 0;
}

// Likewise back, of a table of up to 16 values, which one register holds; what is no code is left to the loop.
template <class Code>
int64_t decode_vectors(const CodePlan& p, const Code* from, float* out, int64_t count) {
  if (sizeof(Code) != 1 || p.kind != 2 || p.bits > 4) return 0;
  const __m512 values = _mm512_loadu_ps(p.values);
  const __m512i last = _mm512_set1_epi32((1 << p.bits) - 1);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    if (_mm512_cmpgt_epu32_mask(codes, last)) break;
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(codes, values));
  }
  return i;
}

#else

template <class Code>
int64_t decode_vectors(const CodePlan&, const Code*, float*, int64_t) {
  return 0;
}

template <class Code>
int64_t encode_vectors(const CodePlan&, const float*, Code*, int64_t) {
  return 0;
}

#endif

template <class Code>
void encode_run(const CodePlan& plan, const float* __restrict from, Code* __restrict out, int64_t count) {
  const CodePlan& p = plan;
  const int64_t done = encode_vectors(plan, from, out, count);
  from += done, out += done, count -= done;
  if (p.kind == 0) {
    const uint32_t base = bits_of(p.magic), shift = p.shift, offset = p.offset, nan = p.nan_code, top = uint32_t(p.bits - 1);
    const uint32_t nan_mask = p.nan_sign ? 1u : 0u;
    const float low = p.low, magic = p.magic;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(from[i]), m = bits & 0x7fffffffu;
      const float a = float_of(m);
      const uint32_t small = bits_of(a + magic) - base, normal = (m >> shift) - offset;
      const uint32_t code = a < low ? small : normal, sign = bits >> 31;
      out[i] = Code(m > 0x7f800000u ? nan | (sign & nan_mask) << top : code | sign << top);
    }
  } else if (p.kind == 1) {
    const int64_t mask = (int64_t(1) << p.bits) - 1;
    const int32_t zero = p.zero;
    if (p.bits <= 24) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = Code((int32_t(from[i]) + zero) & int32_t(mask));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = Code((int64_t(from[i]) + zero) & mask);
    }
  } else if (p.kind == 3) {  // what is not positive has code 0
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(from[i]), field = bits >> 23;
      const uint32_t code = field > 254 ? 254 : field;
      out[i] = Code((bits & 0x7fffffffu) > 0x7f800000u ? p.nan_code : bits >> 31 ? 0u : code);
    }
  } else {
    for (int64_t first = 0; first < count; first += 64) {
      const int64_t lanes = count - first < 64 ? count - first : 64;
      int32_t index[64] = {};
      for (int32_t at = 1; at < p.count; ++at) {
        const float start = p.grid[at];
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) index[i] += from[first + i] >= start ? 1 : 0;
      }
      const int32_t minus_zero = p.minus_zero, nan = int32_t(p.nan_code);
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        const float v = from[first + i];
        const int32_t code = bits_of(v) == 0x80000000u ? minus_zero : p.code_of[index[i]];
        out[first + i] = Code(v != v ? nan : code);
      }
    }
  }
}

// True if a code is not one of the format.
template <class Code, class Wide>
bool decode_run(const CodePlan& plan, const Code* __restrict from, float* __restrict out, int64_t count) {
  const CodePlan& p = plan;
  using Unsigned = std::make_unsigned_t<Wide>;
  const int64_t done = decode_vectors(plan, from, out, count);
  from += done, out += done, count -= done;
  Unsigned beyond = 0;
  if (p.kind == 0) {
    const uint32_t top = uint32_t(p.bits - 1), magnitude = (1u << top) - 1, nan = 0x7fc00000u, lone = p.lone_nan;
    const uint32_t shift = p.shift, offset = p.offset, first = p.first_normal, special = p.special_from, infinity = p.infinity;
    const float quantum = p.quantum;
#pragma omp simd reduction(| : beyond)
    for (int64_t i = 0; i < count; ++i) {
      const Unsigned whole = Unsigned(Wide(from[i]));
      const uint32_t code = uint32_t(whole), m = code & magnitude;
      beyond |= whole >> top >> 1;
      // of larger codes the product would be subnormal for nothing, which is slow
      const uint32_t small = bits_of(float(int32_t(m < first ? m : 0u)) * quantum), normal = (m + offset) << shift;
      uint32_t bits = m < first ? small : normal;
      bits = m >= special ? (m == infinity ? 0x7f800000u : nan) : bits;
      bits |= (code >> top & 1u) << 31;
      out[i] = float_of(code == lone ? nan : bits);
    }
  } else if (p.kind == 1) {
    const Wide half = p.is_signed ? Wide(1) << (p.bits - 1) : 0, zero = p.zero;
#pragma omp simd reduction(| : beyond)
    for (int64_t i = 0; i < count; ++i) {
      const Wide code = Wide(from[i]);
      beyond |= Unsigned(code) >> (p.bits - 1) >> 1;
      out[i] = float((code ^ half) - half - zero);
    }
  } else {
    const Unsigned mask = (Unsigned(1) << p.bits) - 1;
    for (int64_t i = 0; i < count; ++i) {
      const Unsigned code = Unsigned(Wide(from[i]));
      beyond |= code >> p.bits;
      out[i] = p.values[code & mask];
    }
  }
  return beyond != 0;
}

}  // namespace
