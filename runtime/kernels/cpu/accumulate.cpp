// Accumulate: C_MN = A_MK B_KN, rounded to the accumulator's format after every multiply-add, in increasing k:
//
//   total = 0; for each chunk of K: part = 0; for k in the chunk: part = Q(part + a b);  total = Q(total + part)
//
// as runtime/kernels/reference.py does, bit for bit. With one chunk there is no outer add. The caller has shown that
// a b is exact in fp32, and says how Q is reached from the fp32 sum:
//
//   direct   Q(fl(part + a b)): rounding twice is rounding once (runtime/kernels/cpu/accumulate.py says when)
//   scaled   direct, with A times a power of two that lays the accumulator's subnormals on those of fp32. There adding to
//            the bits and clearing the low ones rounds subnormals as well, so that Q has no special case. Finite inputs
//            only: sums saturate, so nothing else can turn up.
//   odd      the sum is first rounded to odd: fl(x + y) and its exact error; an inexact even result moves one ulp towards
//            the error. Q of that is Q of the exact sum for every Q of at most 22 significant bits (Boldo, Melquiond 2008).
//
// 16 columns to a vector, 8 x 32 results in registers, each with its own chain of roundings.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512DQ__)

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

// Q(s) where the accumulator's subnormals lie on fp32's and s is finite.
inline __m512 round_scaled(__m512 s, const CastPlan& p) {
  const __m512i bits = _mm512_castps_si512(s);
  const __mmask16 last = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(int(p.odd_mask << p.shift)));
  __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(int(p.round_bias)));
  up = _mm512_mask_add_epi32(up, last, up, _mm512_set1_epi32(1));
  const __m512 kept = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(p.keep_mask))));
  return _mm512_range_ps(kept, _mm512_set1_ps(p.max), 2);
}

// x + y rounded to odd.
inline __m512 add_to_odd(__m512 x, __m512 y) {
  const __m512 s = _mm512_add_ps(x, y), back = _mm512_sub_ps(s, x);
  const __m512 error = _mm512_add_ps(_mm512_sub_ps(x, _mm512_sub_ps(s, back)), _mm512_sub_ps(y, back));
  const __m512 zero = _mm512_setzero_ps();
  const __m512i bits = _mm512_castps_si512(s);
  const __mmask16 even = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(1));
  const __mmask16 finite = _mm512_cmp_ps_mask(magnitude(error), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  const __mmask16 inexact = _mm512_cmp_ps_mask(error, zero, _CMP_NEQ_OQ) & even & finite;
  const __mmask16 outward = ~(_mm512_cmp_ps_mask(error, zero, _CMP_GT_OQ) ^ _mm512_cmp_ps_mask(s, zero, _CMP_GT_OQ));
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i grown = _mm512_mask_add_epi32(bits, inexact & outward, bits, one);
  return _mm512_castsi512_ps(_mm512_mask_sub_epi32(grown, inexact & ~outward, bits, one));
}

enum class Path { kScaled, kDirect, kOdd };

template <Path path>
inline __m512 accumulate(__m512 part, __m512 a, __m512 b, const CastPlan& p) {
  if constexpr (path == Path::kOdd) return round(add_to_odd(part, _mm512_mul_ps(a, b)), p);
  const __m512 s = _mm512_fmadd_ps(a, b, part);
  return path == Path::kScaled ? round_scaled(s, p) : round(s, p);
}

template <Path path>
inline __m512 add_chunk(__m512 total, __m512 part, const CastPlan& p) {
  const __m512 s = add_to_odd(total, part);
  return path == Path::kScaled ? round_scaled(s, p) : round(s, p);
}

template <Path path>
void multiply_panels(const float* a, const float* b, int64_t num_k, int64_t chunk, const CastPlan& p, __m512 total[kRows][2]) {
  const bool is_one_chunk = num_k <= chunk;
  for (int64_t start = 0; start < num_k; start += chunk) {
    __m512 part[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = _mm512_setzero_ps();
    for (int64_t k = start; k < std::min(start + chunk, num_k); ++k) {
      const __m512 left = _mm512_loadu_ps(b + k * kColumns), right = _mm512_loadu_ps(b + k * kColumns + 16);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x = _mm512_set1_ps(a[k * kRows + r]);
        part[r][0] = accumulate<path>(part[r][0], x, left, p);
        part[r][1] = accumulate<path>(part[r][1], x, right, p);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < 2; ++h)
        total[r][h] = is_one_chunk ? part[r][h] : add_chunk<path>(total[r][h], part[r][h], p);
  }
}

// One panel, times `scale`; whether all of it is finite.
bool pack(const float* x, int64_t outer, int64_t inner, int64_t width, int64_t valid, int64_t num_k, float scale, float* out) {
  float sum = 0.0f;  // 0 times anything finite is 0
  for (int64_t k = 0; k < num_k; ++k)
    for (int64_t i = 0; i < width; ++i) {
      const float v = i < valid ? x[i * outer + k * inner] : 0.0f;
      sum += 0.0f * v;
      out[k * width + i] = v * scale;
    }
  return sum == 0.0f;
}

}  // namespace

extern "C" {

int lp_accumulate_is_supported() { return 1; }

// c: [m, n] fp32, row-major. a: element (m, k) at outer m + inner k; b: element (k, n) at outer n + inner k; both fp32.
// scale: the power of two of `scaled`, or 0 for `direct`, or -1 for `odd`.
void lp_accumulate(const CastPlan* plan, float scale, const float* a, int64_t a_outer, int64_t a_inner, const float* b,
                   int64_t b_outer, int64_t b_inner, float* c, int64_t m, int64_t n, int64_t k, int64_t chunk, int threads) {
  const int64_t row_panels = (m + kRows - 1) / kRows, column_panels = (n + kColumns - 1) / kColumns;
  std::vector<float> packed_a(size_t(row_panels * kRows * k) + 16), packed_b(size_t(column_panels * kColumns * k) + 16);
  Path path = scale > 0 ? Path::kScaled : scale == 0 ? Path::kDirect : Path::kOdd;
  bool is_finite = true;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) reduction(&& : is_finite)
    for (int64_t i = 0; i < row_panels; ++i)
      is_finite = pack(a + i * kRows * a_outer, a_outer, a_inner, kRows, std::min<int64_t>(kRows, m - i * kRows), k,
                       path == Path::kScaled ? scale : 1.0f, &packed_a[size_t(i * kRows * k)]) && is_finite;
#pragma omp for schedule(static) reduction(&& : is_finite)
    for (int64_t j = 0; j < column_panels; ++j)
      is_finite = pack(b + j * kColumns * b_outer, b_outer, b_inner, kColumns, std::min<int64_t>(kColumns, n - j * kColumns),
                       k, 1.0f, &packed_b[size_t(j * kColumns * k)]) && is_finite;
  }
  if (path == Path::kScaled && !is_finite) return lp_accumulate(plan, 0, a, a_outer, a_inner, b, b_outer, b_inner, c, m, n, k, chunk, threads);
  CastPlan used = *plan;
  if (path == Path::kScaled) used.max *= scale;
  const auto multiply = path == Path::kScaled  ? multiply_panels<Path::kScaled>
                        : path == Path::kDirect ? multiply_panels<Path::kDirect>
                                                : multiply_panels<Path::kOdd>;
  const __m512 back = _mm512_set1_ps(path == Path::kScaled ? 1.0f / scale : 1.0f);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t task = 0; task < row_panels * column_panels; ++task) {
    const int64_t i = task % row_panels, j = task / row_panels;
    __m512 total[kRows][2];
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    multiply(&packed_a[size_t(i * kRows * k)], &packed_b[size_t(j * kColumns * k)], k, chunk, used, total);
    const int64_t rows = std::min<int64_t>(kRows, m - i * kRows), columns = std::min<int64_t>(kColumns, n - j * kColumns);
    const __mmask16 left = __mmask16((1u << std::min<int64_t>(16, columns)) - 1);
    const __mmask16 right = columns > 16 ? __mmask16((1u << (columns - 16)) - 1) : __mmask16(0);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = c + (i * kRows + r) * n + j * kColumns;
      _mm512_mask_storeu_ps(row, left, _mm512_mul_ps(total[r][0], back));
      _mm512_mask_storeu_ps(row + 16, right, _mm512_mul_ps(total[r][1], back));
    }
  }
}

}  // extern "C"

#else

extern "C" int lp_accumulate_is_supported() { return 0; }

#endif
