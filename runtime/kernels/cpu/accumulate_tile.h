// Accumulate: sums in fp32 lanes that are rounded to the accumulator's format after every multiply-add; what accumulate.cpp
// (matrices) and accumulate_conv.cpp (convolutions) have in common. accumulate.cpp says how, and accumulate.py why.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "philox.h"
#include "transpose.h"

namespace {

constexpr int kRows = 8, kColumns = 32;

// Mirrors CastPlan of cast.cpp, which explains each field.
struct CastPlan {
  uint32_t shift, round_bias, odd_mask, keep_mask;
  float low, magic, spacing, up_at, down_below, max, zero;
};

inline __m512 magnitude(__m512 v) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff))); }

inline __m512 with_sign(__m512 size, __m512 sign) {  // bitwise: sign ? sign : size, by a mask of the sign bit
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(size), _mm512_castps_si512(sign),
                                                       _mm512_set1_epi32(int(0x80000000u)), 0xd8));
}

// How to sum; mirrors How of accumulate.py. smallest_product: every product is a multiple of it, by the formats. least_sum: from
// there on precision is constant. a_bits, b_bits: the significant bits of the operands. is_fp32: `fp32`, is_odd: `odd`, is_away:
// `cut`, else `direct`. is_general: what follows holds, and is not the default. digits: b, 0 if not stochastic.
struct How {
  double smallest_product, least_sum;
  int32_t a_bits, b_bits, is_fp32, is_odd, is_away, is_general, is_cut, is_rounded_product, is_per_chunk, digits;
  int64_t first_element, num_elements;
  RandomPlan random;
};

// Lanes of |s| below the constant precision, or NaN: apart, because they are rare.
__attribute__((noinline, cold)) __m512 round_rare(__m512 s, __m512 rounded, __mmask16 rare, const CastPlan& p) {
  const __m512 a = magnitude(s), spacing = _mm512_set1_ps(p.spacing), magic = _mm512_set1_ps(p.magic);
  __m512 t = _mm512_sub_ps(_mm512_add_ps(a, magic), magic);
  const __m512 d = _mm512_sub_ps(a, t);
  t = _mm512_mask_add_ps(t, _mm512_cmp_ps_mask(d, _mm512_set1_ps(p.up_at), _CMP_GE_OQ), t, spacing);
  t = _mm512_mask_sub_ps(t, _mm512_cmp_ps_mask(d, _mm512_set1_ps(p.down_below), _CMP_LT_OQ), t, spacing);
  rounded = _mm512_mask_mov_ps(rounded, rare, with_sign(t, s));
  return _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q), s);
}

// Q(s): on the accumulator's grid, saturated; NaN stays. The sign bit rides along: what is added stays below it.
// vrangeps 0b0010 is the operand smaller in magnitude, with the sign of the first.
inline __m512 round(__m512 s, const CastPlan& p) {
  const __m512i bits = _mm512_castps_si512(s);
  const __mmask16 last = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(int(p.odd_mask << p.shift)));
  __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(int(p.round_bias)));
  up = _mm512_mask_add_epi32(up, last, up, _mm512_set1_epi32(1));
  const __m512 kept = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(p.keep_mask))));
  const __m512 rounded = _mm512_range_ps(kept, _mm512_set1_ps(p.max), 2);
  const __mmask16 rare = _mm512_cmp_ps_mask(magnitude(s), _mm512_set1_ps(p.low), _CMP_NGE_UQ);
  if (__builtin_expect(rare != 0, 0)) return round_rare(s, rounded, rare, p);
  return rounded;
}

// Q(s), to nearest, in a clear tile. Even: 1.5 2^(e + 23 - M) + s has the last bit of its significand at bit M of s.
template <bool Even>
inline __m512 round_clear(__m512 s, const CastPlan& p) {
  const __m512i bits = _mm512_castps_si512(s);
  if constexpr (Even) {
    const __m512 power = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000)));
    const __m512 lift = _mm512_set1_ps(1.5f * float(1u << p.shift));
    return _mm512_fnmadd_ps(power, lift, _mm512_fmadd_ps(power, lift, s));
  }
  const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(int(p.round_bias)));
  return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(p.keep_mask))));
}

// Q(s), to nearest even, where no sum saturates: below the constant precision the spacing is that of the smallest power.
inline __m512 round_low_even(__m512 s, const CastPlan& p) {
  const __m512 top = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(s), _mm512_set1_epi32(0x7f800000)));
  const __m512 power = _mm512_max_ps(top, _mm512_set1_ps(p.low)), lift = _mm512_set1_ps(1.5f * float(1u << p.shift));
  return with_sign(_mm512_fnmadd_ps(power, lift, _mm512_fmadd_ps(power, lift, s)), s);
}

// Q(s), to nearest away, where no sum saturates and the accumulator has no subnormals: 0 below the tie of its smallest.
inline __m512 round_low_away(__m512 s, const CastPlan& p) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(s), _mm512_set1_epi32(int(p.round_bias)));
  const __m512i kept = _mm512_and_si512(up, _mm512_set1_epi32(int(p.keep_mask)));
  const __mmask16 is_zero = _mm512_cmp_ps_mask(magnitude(s), _mm512_set1_ps(p.up_at), _CMP_LT_OQ);
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(kept, is_zero, kept, _mm512_set1_epi32(int(0x80000000u))));
}

// Of a result rounded down and rounded up the odd one: both are the exact one, or neighbours around it. An exact 0 is +0 as
// to nearest, which rounding down would make -0.
inline __m512 odd_of(__m512 down, __m512 up) {
  return _mm512_mask_mov_ps(up, _mm512_test_epi32_mask(_mm512_castps_si512(down), _mm512_set1_epi32(1)), down);
}

constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC, kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;

inline __m512 add_to_odd(__m512 x, __m512 y) { return odd_of(_mm512_add_round_ps(x, y, kDown), _mm512_add_round_ps(x, y, kUp)); }

inline __m512 multiply_to_odd(__m512 a, __m512 b) {
  return odd_of(_mm512_mul_round_ps(a, b, kDown), _mm512_mul_round_ps(a, b, kUp));
}

// a b + x rounded to odd.
inline __m512 multiply_add_to_odd(__m512 a, __m512 b, __m512 x) {
  return odd_of(_mm512_fmadd_round_ps(a, b, x, kDown), _mm512_fmadd_round_ps(a, b, x, kUp));
}

constexpr int kZero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

enum class Path { kFp32, kDirect, kOdd, kAway, kClearEven, kClearOddEven, kClearAway, kLowEven, kLowOddEven, kLowAway };

constexpr bool is_odd(Path path) { return path == Path::kOdd || path == Path::kClearOddEven || path == Path::kLowOddEven; }
constexpr bool is_away(Path path) { return path == Path::kAway || path == Path::kClearAway || path == Path::kLowAway; }

template <Path path>
inline __m512 round_on(__m512 s, const CastPlan& p) {
  if constexpr (path == Path::kFp32) return s;
  if constexpr (path == Path::kDirect || path == Path::kOdd || path == Path::kAway) return round(s, p);
  if constexpr (path == Path::kLowEven || path == Path::kLowOddEven) return round_low_even(s, p);
  if constexpr (path == Path::kLowAway) return round_low_away(s, p);
  return round_clear<path != Path::kClearAway>(s, p);
}

template <Path path>
inline __m512 accumulate(__m512 part, __m512 a, __m512 b, const CastPlan& p) {
  if constexpr (is_odd(path)) return round_on<path>(multiply_add_to_odd(a, b, part), p);
  if constexpr (is_away(path)) return round_on<path>(_mm512_fmadd_round_ps(a, b, part, kZero), p);
  return round_on<path>(_mm512_fmadd_ps(a, b, part), p);
}

// The product is rounded as well: to nearest even it is exact in fp32, or fp32 is the accumulator. It is on the accumulator's grid
// then, and its sum with what is on that grid, direct.
template <Path path>
inline __m512 accumulate_rounded(__m512 part, __m512 a, __m512 b, const CastPlan& p) {
  if constexpr (is_away(path))
    return round_on<path>(_mm512_add_round_ps(part, round_on<path>(_mm512_mul_round_ps(a, b, kZero), p), kZero), p);
  return round_on<path>(_mm512_add_ps(part, round_on<path>(_mm512_mul_ps(a, b), p)), p);
}

template <Path path>
inline __m512 add_chunk(__m512 total, __m512 part, const CastPlan& p) {
  if constexpr (path == Path::kFp32) return _mm512_add_ps(total, part);
  return round_on<path>(is_away(path) ? _mm512_add_round_ps(total, part, kZero) : add_to_odd(total, part), p);
}

// `num_k` products more in each part, Rows x Vectors of them: a[k kRows + row], b[k Vectors 16 + column].
template <Path path, bool RoundedProduct, int Rows, int Vectors>
void run(const float* a, const float* b, int64_t num_k, const CastPlan& p, __m512* parts) {
  __m512 part[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Vectors; ++i) part[i / Vectors][i % Vectors] = parts[i];
  for (int64_t k = 0; k < num_k; ++k) {
    __m512 column[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) column[v] = _mm512_loadu_ps(b + (k * Vectors + v) * 16);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512 x = _mm512_set1_ps(a[k * kRows + r]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v)
        part[r][v] = RoundedProduct ? accumulate_rounded<path>(part[r][v], x, column[v], p) : accumulate<path>(part[r][v], x, column[v], p);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Vectors; ++i) parts[i] = part[i / Vectors][i % Vectors];
}

// The end of a chunk: its parts into the totals. One chunk is the total.
template <Path path>
void close(int count, bool is_one_chunk, const CastPlan& p, __m512* parts, __m512* totals) {
  for (int i = 0; i < count; ++i) {
    totals[i] = is_one_chunk ? parts[i] : add_chunk<path>(totals[i], parts[i], p);
    parts[i] = _mm512_setzero_ps();
  }
}

// Whether what rounds by its bits to the smallest value is all that rounds to it, the rest being 0 (dlfloat16).
inline bool is_zero_below_tie(const CastPlan& p) {
  if (p.spacing != p.low || !(p.up_at < p.spacing) || std::ilogb(p.up_at) != std::ilogb(p.spacing)) return false;
  return p.up_at == p.spacing - std::ldexp(1.0f, std::ilogb(p.spacing) + int(p.shift) - 24);
}

// The path of a tile: `has_room` if no sum can saturate, `is_clear` if none can fall below the constant precision either.
inline Path path_of(const How& how, const CastPlan& p, bool has_room, bool is_clear) {
  if (how.is_fp32) return Path::kFp32;
  if (how.is_away) return !has_room ? Path::kAway : is_clear ? Path::kClearAway : is_zero_below_tie(p) ? Path::kLowAway : Path::kAway;
  const bool is_even = p.odd_mask != 0, is_low = p.spacing != p.low;  // with subnormals
  if (how.is_odd) return !has_room || !is_even ? Path::kOdd : is_clear ? Path::kClearOddEven : is_low ? Path::kLowOddEven : Path::kOdd;
  return !has_room || !is_even ? Path::kDirect : is_clear ? Path::kClearEven : is_low ? Path::kLowEven : Path::kDirect;
}

// f.operator()<path>() of a path that is known as the code runs.
template <class F>
auto on_path(Path path, F f) {
  switch (path) {
    case Path::kFp32: return f.template operator()<Path::kFp32>();
    case Path::kDirect: return f.template operator()<Path::kDirect>();
    case Path::kOdd: return f.template operator()<Path::kOdd>();
    case Path::kAway: return f.template operator()<Path::kAway>();
    case Path::kClearEven: return f.template operator()<Path::kClearEven>();
    case Path::kClearOddEven: return f.template operator()<Path::kClearOddEven>();
    case Path::kClearAway: return f.template operator()<Path::kClearAway>();
    case Path::kLowEven: return f.template operator()<Path::kLowEven>();
    case Path::kLowOddEven: return f.template operator()<Path::kLowOddEven>();
    default: return f.template operator()<Path::kLowAway>();
  }
}

// What no sum may reach, as K |a| |b|, for `has_room`: below the largest value and far enough below that of fp32, times what
// every rounding may add.
inline double room(const CastPlan& p, const How& how, int64_t k, int64_t chunk) {
  const double steps = double(std::min(chunk, k) + (k + chunk - 1) / chunk + 2), unit = std::ldexp(1.0, int(p.shift) - 23);
  const double growth = double(k) * std::exp(steps * unit) * (how.is_rounded_product ? 1 + unit : 1);
  return std::min(double(p.max), std::ldexp(1.0, 125 - int(p.shift))) / growth;
}

// What is in a panel: its largest magnitude, NaN if there is a NaN, and its smallest but zero, the largest fp32 if there is none.
struct Range {
  float top, bottom;
};

// The magnitudes that were seen, as bits; 0 is the largest of those less one.
struct Seen {
  __m512i top = _mm512_setzero_si512(), bottom = _mm512_set1_epi32(0x7f7ffffe);
  void add(__m512 v) {
    const __m512i bits = _mm512_castps_si512(magnitude(v));
    top = _mm512_max_epu32(top, bits);
    bottom = _mm512_min_epu32(bottom, _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));
  }
  Range range() const {
    const uint32_t bits[2] = {_mm512_reduce_max_epu32(top), _mm512_reduce_min_epu32(bottom) + 1};
    Range range;
    std::memcpy(&range, bits, 8);
    return range;
  }
};

inline __m512 strided(const float* from, int64_t stride, int64_t count) {
  alignas(64) float v[16] = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i * stride];
  return _mm512_load_ps(v);
}

// One panel into zeros: out[k width + i] is element (i, k), at x[i outer + k inner].
Range pack(const float* x, int64_t outer, int64_t inner, int64_t width, int64_t valid, int64_t num_k, float* out) {
  Seen seen;
  if (outer == 1) {
    for (int64_t k = 0; k < num_k; ++k)
      for (int64_t i = 0; i < valid; i += 16) {
        const __mmask16 lanes = valid - i < 16 ? __mmask16((1u << (valid - i)) - 1) : __mmask16(0xffff);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i + k * inner);
        seen.add(v);
        _mm512_mask_storeu_ps(out + k * width + i, lanes, v);
      }
    return seen.range();
  }
  for (int64_t k = 0; k < num_k; k += 16) {
    const int64_t depth = std::min<int64_t>(16, num_k - k);
    const __mmask16 lanes = __mmask16((1u << depth) - 1);
    for (int64_t first = 0; first < valid; first += 16) {
      __m512i block[16];
      for (int64_t i = 0; i < 16; ++i) {
        const float* from = x + (first + i) * outer + k * inner;
        __m512 v = _mm512_setzero_ps();
        if (first + i < valid) v = inner == 1 ? _mm512_maskz_loadu_ps(lanes, from) : strided(from, inner, depth);
        seen.add(v);
        block[i] = _mm512_castps_si512(v);
      }
      transpose16(block);
      for (int64_t j = 0; j < depth; ++j)
        _mm512_mask_storeu_epi32(out + (k + j) * width + first, __mmask16((1u << std::min<int64_t>(16, width)) - 1), block[j]);
    }
  }
  return seen.range();
}

// Every value of a panel is a multiple of this power of two: its smallest has `bits` significant ones.
double quantum_of(float smallest, int bits) { return std::ldexp(1.0, std::ilogb(double(smallest)) - (bits - 1)); }

}  // namespace

#endif
