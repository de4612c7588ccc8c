// Odd sums: a x + b y of fp32 values in double, rounded to odd, so that rounding it again is rounding the exact sum
// (runtime/optim/rounding.py); and its rounding to a scalar format, bit for bit as grid.cpp has it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bits.h"
#include "grid_plan.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// p + q rounded to odd: where the sum in double is not exact and even, its neighbour on the side of what was lost.
inline double odd_sum(double p, double q) {
  const double total = p + q, back = total - p, lost = (p - (total - back)) + (q - back);
  const uint64_t bits = bits_of(total);
  // lost and total of one sign: away from zero by 1 where the last bit is 0; of two: toward zero. Without a branch: of a
  // sum that is not finite lost is NaN, and of an exact one 0.
  const uint64_t is_even = (bits & 1) ^ 1, is_opposite = (bits_of(lost) ^ bits) >> 63;
  const double size = std::fabs(lost);
  const uint64_t moved = bits + is_even - 2 * (is_even & is_opposite);
  const double finite = size > 0.0 ? double_of(moved) : total;
  return size <= std::numeric_limits<double>::max() ? finite : total;
}

#ifdef __AVX512F__
// Eight of them: a x is exact, and the sum is rounded down and up. Where the two differ, one of them is odd; of an exact
// sum they are equal, but for a zero, whose sign is that of rounding up.
inline __m512d odd_sums(__m512d a, const float* x, __m512d b, const float* y) {
  const __m512d p = _mm512_mul_pd(a, _mm512_cvtps_pd(_mm256_loadu_ps(x))), v = _mm512_cvtps_pd(_mm256_loadu_ps(y));
  const __m512d down = _mm512_fmadd_round_pd(b, v, p, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512d up = _mm512_fmadd_round_pd(b, v, p, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  return _mm512_mask_mov_pd(up, _mm512_test_epi64_mask(_mm512_castpd_si512(down), _mm512_set1_epi64(1)), down);
}
#endif

// out = a x + b y: as it is, or in fp32, to nearest. out may be x or y.
inline void odd_run(double a, const float* x, double b, const float* y, int64_t count, double* out) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 8 <= count; i += 8) _mm512_storeu_pd(out + i, odd_sums(_mm512_set1_pd(a), x + i, _mm512_set1_pd(b), y + i));
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j) out[j] = odd_sum(x[j] * a, y[j] * b);
}

inline void odd_run(double a, const float* x, double b, const float* y, int64_t count, float* out) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm512_cvtpd_ps(odd_sums(_mm512_set1_pd(a), x + i, _mm512_set1_pd(b), y + i)));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j) out[j] = float(odd_sum(x[j] * a, y[j] * b));
}

// Rounds by adding to the bits: in a binade all values are equally far apart. Below the lowest one that is so once its
// bottom has been added; what that sum loses is cut off and kept as a last bit that is set.
//
// For floats of 1 to 19 fraction bits, saturating. Whether a value lay in the format's gap about zero, where another rule
// holds: of those `out` has no meaning.
template <int M>
bool round_odd(const GridPlan& plan, const double* __restrict x, const uint32_t* __restrict words, int64_t count,
               float* __restrict out) {
  const GridPlan p = plan;
  const int drop = 52 - p.mantissa;
  const double base = double_of(uint64_t(p.emin + 1023) << 52);
  const uint64_t keep = ~uint64_t(0) << drop, half = uint64_t(1) << (drop - 1), zero_sign = p.has_negative_zero ? 0 : ~uint64_t(0);
  uint64_t in_gap = 0;
#pragma omp simd reduction(| : in_gap)
  for (int64_t i = 0; i < count; ++i) {
    const double y = x[i];
    const uint64_t bits = bits_of(y), sign = bits & 0x8000000000000000u, given = bits ^ sign;
    const double a = double_of(given);
    const double lifted = (a < base ? a : base) + base, lost = (a < base ? a : base) - (lifted - base);
    const uint64_t low = (bits_of(lifted) - (lost < 0 ? 1 : 0)) | (lost != 0 ? 1 : 0);
    uint64_t size = a < base ? low : given;
    if (M == kEven) size += half - 1 + (size >> drop & 1);
    if (M == kAway) size += half;
    if (M == kStochastic) size += uint64_t(words[i]) << (drop - 32);
    const double q = double_of(size & keep) - (a < base ? base : 0.0);
    in_gap |= uint64_t(a < p.gap) & uint64_t(a > 0.0);
    const double signed_q = double_of(bits_of(q) | sign);
    const double inside = signed_q > p.max ? p.max : signed_q < p.min ? p.min : signed_q;
    const double kept = inside == 0.0 ? double_of(bits_of(inside) & ~(zero_sign & 0x8000000000000000u)) : inside;
    out[i] = float(y != y ? y : kept);
  }
  return in_gap != 0;
}

// By chance, for values of which none needs more than an addition to its bits: all lie between the lowest binade (the gap)
// and the largest value, or are 0. False, and nothing written, if one does not.
inline bool round_plain(const GridPlan& p, const double* __restrict x, const uint32_t* __restrict words, int64_t count,
                        float* __restrict out) {
  const int drop = 52 - p.mantissa, lift = drop - 32;
  const double base = double_of(uint64_t(p.emin + 1023) << 52), low = std::max(base, p.gap), max = std::min(p.max, -p.min);
  uint64_t found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < count; ++i) {
    const double a = std::fabs(x[i]);
    found |= (uint64_t(a < low) & uint64_t(a != 0.0)) | uint64_t(!(a <= max));
  }
  if (found) return false;
  const uint64_t keep = ~uint64_t(0) << drop;
  const double zero = p.has_negative_zero ? -0.0 : 0.0;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = float(double_of((bits_of(x[i]) + (uint64_t(words[i]) << lift)) & keep) + zero);
  }
  return true;
}

// By chance, where a value lay in the gap: those alone.
inline void round_in_gap(const GridPlan& p, const double* __restrict x, const uint32_t* __restrict words, int64_t count,
                         float* __restrict out) {
  const double gap = p.gap;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double y = x[i], a = std::fabs(y), q = a / gap >= 1.0 - words[i] * 0x1p-32 ? gap : 0.0;
    const double signed_q = q == 0.0 && !p.has_negative_zero ? 0.0 : std::copysign(q, y);
    out[i] = a < gap ? float(signed_q) : out[i];
  }
}

}  // namespace
