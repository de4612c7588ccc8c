// Accumulate: C_MN = A_MK B_KN, rounded to the accumulator's format after every multiply-add, in increasing k:
//
//   total = 0; for each chunk of K: part = 0; for k in the chunk: part = Q(part + a b);  total = Q(total + part)
//
// as runtime/numerics/reference_gemm.py does, bit for bit. With one chunk there is no outer add. The caller says how Q is reached
// from a sum in fp32 lanes:
//
//   fp32     Q is the adder's own rounding to nearest even; Inf and NaN as IEEE 754 has them
//   direct   Q(fl(part + a b)): rounding twice is rounding once (runtime/kernels/cpu/accumulate.py says when)
//   cut      the sum is rounded toward zero first, for nearest away: whether a magnitude reaches the middle of its neighbours is seen
//            in what is left of it. Nothing is asked of the product.
//   odd      the sum is first rounded to odd: a b + part is rounded down and up, which is exact or gives two neighbours, of
//            which one is odd. Q of that is Q of the exact sum for every Q of at most 22 significant bits whose quantum is
//            2^-147 or more (Boldo, Melquiond 2008). Nothing is asked of the product: the unit adds all of its bits.
//
// A tile has room where no sum can saturate, by the largest |a| and |b| of its rows and columns, and is `clear` where none can
// fall below the constant precision either, by the formats or by the smallest |a| and |b|. Then Q is two operations: adding and
// subtracting 1.5 2^(23 - M) times the sum's power of two lets the adder round to nearest even at bit M, and for the other modes
// a constant or the draw is added to the bits and the low ones are cleared. With room alone (`low`) that power is at least the
// smallest of the accumulator, which rounds subnormals too, and the sign is put back; away from zero without subnormals, what
// lies below the tie of the smallest value is cleared.
//
// The other choices of an AccumulateSpec have their own loop, `multiply_general`: every sum and every product is rounded to
// odd (nearest), or toward zero (toward zero and stochastic), and then by Q. Cutting twice is cutting once, and what
// stochastic rounding compares with its b random bits, floor(rest 2^b), is in an fp32 sum that was cut, since b <= 23 - M.
// The draws are those of reference.py.
//
// 16 columns to a vector, 8 x 32 results in registers, each with its own chain of roundings.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "accumulate_tile.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

namespace {

constexpr int64_t kGroupFloats = 1 << 17;

// Lanes of |s| below the constant precision, or NaN, stochastically; apart, because they are rare. Exact in double.
__attribute__((noinline, cold)) __m512 round_rare_by_draw(__m512 s, __m512 rounded, __mmask16 rare, __m512i draw, const CastPlan& p,
                                                          int digits) {
  alignas(64) float from[16], to[16];
  alignas(64) uint32_t bits[16];
  _mm512_store_ps(from, s);
  _mm512_store_ps(to, rounded);
  _mm512_store_si512(bits, draw);
  const double spacing = p.spacing, full = double(1 << digits);
  for (int i = 0; i < 16; ++i) {
    const double a = std::fabs(double(from[i])), below = std::floor(a / spacing) * spacing;
    const double t = (a - below) * full >= spacing * (full - bits[i]) ? below + spacing : below;
    if ((rare >> i) & 1) to[i] = std::isnan(from[i]) ? from[i] : std::copysign(float(t), from[i]);
  }
  return _mm512_load_ps(to);
}

// Q(s) of a sum that was cut: the draw, `digits` random bits right below the last bit that is kept, is added.
template <bool Clear>
inline __m512 round_by_draw(__m512 s, __m512i noise, const CastPlan& p, int digits) {
  const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(s), noise);
  const __m512 kept = _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(int(p.keep_mask))));
  if (Clear) return kept;
  const __m512 rounded = _mm512_range_ps(kept, _mm512_set1_ps(p.max), 2);
  const __mmask16 rare = _mm512_cmp_ps_mask(magnitude(s), _mm512_set1_ps(p.low), _CMP_NGE_UQ);
  if (__builtin_expect(rare != 0, 0))
    return round_rare_by_draw(s, rounded, rare, _mm512_srlv_epi32(noise, _mm512_set1_epi32(int(p.shift) - digits)), p, digits);
  return rounded;
}

// Q(s) of a sum that was cut, toward zero.
template <bool Clear>
inline __m512 round_down(__m512 s, const CastPlan& p) {
  if (!Clear) return round(s, p);
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(s), _mm512_set1_epi32(int(p.keep_mask))));
}

struct Words {
  __m512i word[4];
};

// The words of the counters first ... first + 15.
inline Words philox_words(const RandomPlan& plan, int64_t first) {
  const __m512i even = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
  const __m512i n[2] = {even, _mm512_add_epi64(even, _mm512_set1_epi64(1))};
  __m512i c[2][4];
  philox_rounds<2>(plan, n, c);
  Words words;
  for (int w = 0; w < 4; ++w)  // the low halves of the odd counters go into the high halves
    words.word[w] = _mm512_mask_shuffle_epi32(c[0][w], 0xaaaa, c[1][w], _MM_PERM_CCAA);
  return words;
}

// The draws of one kind of rounding (adds, outer adds, products), in increasing number, for the 8 x 32 results of a tile.
class Draws {
 public:
  Draws(const How& how, const CastPlan& p, int64_t element, int64_t row_stride)
      : how_(how), element_(element), row_stride_(row_stride), more_(int(p.shift) - how.digits) {}

  // Makes draw `number` the current one.
  void move_to(int64_t number, int rows) {
    if (number / 8 != group_) {
      group_ = number / 8;
      for (int r = 0; r < rows; ++r)
        for (int h = 0; h < 2; ++h)
          words_[r][h] = philox_words(how_.random, group_ * how_.num_elements + element_ + r * row_stride_ + 16 * h);
    }
    word_ = int(number % 8) / 2;
    is_upper_ = number % 2;
  }

  // The top `digits` bits of the 16, right below the last bit that is kept.
  __m512i of(int r, int h) const {
    const __m512i word = words_[r][h].word[word_];
    const __m512i noise = is_upper_ ? _mm512_srlv_epi32(word, _mm512_set1_epi32(32 - how_.digits))
                                    : _mm512_maskz_srlv_epi16(0x55555555, word, _mm512_set1_epi16(short(16 - how_.digits)));
    return more_ ? _mm512_sllv_epi32(noise, _mm512_set1_epi32(more_)) : noise;
  }

 private:
  const How& how_;
  const int64_t element_, row_stride_;
  const int more_;
  int64_t group_ = -1;
  int word_ = 0;
  bool is_upper_ = false;
  Words words_[kRows][2];
};

// All chunks of a tile.
struct Panels {
  bool is_rounded_product;
  const float *a, *b;
  int64_t num_k, chunk;
  const CastPlan& p;
  __m512* total;
  template <Path path>
  void operator()() const {
    __m512 part[kRows * 2];
    for (auto& each : part) each = _mm512_setzero_ps();
    for (int64_t start = 0; start < num_k; start += chunk) {
      const int64_t size = std::min(chunk, num_k - start);
      (is_rounded_product ? run<path, true, kRows, 2> : run<path, false, kRows, 2>)(a + start * kRows, b + start * kColumns, size, p, part);
      close<path>(kRows * 2, num_k <= chunk, p, part, total);
    }
  }
};

constexpr int kCut = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

// Where Q is taken of an exact sum or product: IsCut those toward zero, else those to odd; Stochastic by a draw.
template <bool IsCut, bool Stochastic, bool Clear>
struct Rounder {
  const CastPlan& p;
  int digits;
  __m512 finish(__m512 s, const Draws& draws, int r, int h) const {
    if constexpr (Stochastic) return round_by_draw<Clear>(s, draws.of(r, h), p, digits);
    if constexpr (IsCut) return round_down<Clear>(s, p);
    return !Clear ? round(s, p) : p.odd_mask ? round_clear<true>(s, p) : round_clear<false>(s, p);
  }
  __m512 sum(__m512 x, __m512 y) const { return IsCut ? _mm512_add_round_ps(x, y, kCut) : add_to_odd(x, y); }
  __m512 multiply_add(__m512 x, __m512 a, __m512 b) const {
    return IsCut ? _mm512_fmadd_round_ps(a, b, x, kCut) : multiply_add_to_odd(a, b, x);
  }
  __m512 product(__m512 a, __m512 b) const { return IsCut ? _mm512_mul_round_ps(a, b, kCut) : multiply_to_odd(a, b); }
};

// An fp32 sum, saturated: NaN stays.
inline __m512 saturated(__m512 s) {
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  return _mm512_mask_mov_ps(s, _mm512_cmp_ps_mask(magnitude(s), infinity, _CMP_EQ_OQ), with_sign(_mm512_set1_ps(3.40282347e38f), s));
}

template <bool IsCut, bool Stochastic, bool Clear, bool RoundedProduct, bool PerChunk>
void multiply_general(const float* a, const float* b, int64_t num_k, int64_t chunk, const CastPlan& p, const How& how,
                      int64_t element, int64_t row_stride, int rows, __m512 total[kRows][2]) {
  const Rounder<IsCut, Stochastic, Clear> q{p, how.digits};
  const int64_t num_chunks = (num_k + chunk - 1) / chunk, first_outer = PerChunk ? num_chunks : num_k;
  Draws inner(how, p, element, row_stride), outer(how, p, element, row_stride), products(how, p, element, row_stride);
  for (int64_t start = 0, index = 0; start < num_k; start += chunk, ++index) {
    __m512 part[kRows][2];
    for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = _mm512_setzero_ps();
    for (int64_t k = start; k < std::min(start + chunk, num_k); ++k) {
      const __m512 column[2] = {_mm512_loadu_ps(b + k * kColumns), _mm512_loadu_ps(b + k * kColumns + 16)};
      if (Stochastic && !PerChunk) inner.move_to(k, rows);
      if (Stochastic && RoundedProduct) products.move_to(first_outer + num_chunks + k, rows);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x = _mm512_set1_ps(a[k * kRows + r]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512 y = RoundedProduct ? q.finish(q.product(x, column[h]), products, r, h) : x;
          if constexpr (PerChunk) {
            const __m512 sum = RoundedProduct ? _mm512_add_ps(part[r][h], y) : _mm512_fmadd_ps(x, column[h], part[r][h]);
            part[r][h] = Clear ? sum : saturated(sum);
          } else
            part[r][h] = q.finish(RoundedProduct ? q.sum(part[r][h], y) : q.multiply_add(part[r][h], x, column[h]), inner, r, h);
        }
      }
    }
    if (Stochastic && PerChunk) inner.move_to(index, rows);
    if (Stochastic && num_chunks > 1) outer.move_to(first_outer + index, rows);
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < 2; ++h) {
        if (PerChunk) part[r][h] = q.finish(part[r][h], inner, r, h);
        total[r][h] = num_chunks == 1 ? part[r][h] : q.finish(q.sum(total[r][h], part[r][h]), outer, r, h);
      }
  }
}

using MultiplyGeneral = decltype(&multiply_general<false, false, false, false, false>);

template <bool IsCut, bool Stochastic, bool Clear>
MultiplyGeneral general_of(const How& how) {
  if (how.is_rounded_product)
    return how.is_per_chunk ? multiply_general<IsCut, Stochastic, Clear, true, true>
                            : multiply_general<IsCut, Stochastic, Clear, true, false>;
  return how.is_per_chunk ? multiply_general<IsCut, Stochastic, Clear, false, true>
                          : multiply_general<IsCut, Stochastic, Clear, false, false>;
}

MultiplyGeneral general_of(const How& how, bool is_clear) {
  if (how.digits) return is_clear ? general_of<true, true, true>(how) : general_of<true, true, false>(how);
  if (how.is_cut) return is_clear ? general_of<true, false, true>(how) : general_of<true, false, false>(how);
  return is_clear ? general_of<false, false, true>(how) : general_of<false, false, false>(how);
}

}  // namespace

extern "C" {

int lp_accumulate_is_supported() { return 1; }

// c: [m, n] fp32, row-major. a: element (m, k) at outer m + inner k; b: element (k, n) at outer n + inner k; both fp32.
void lp_accumulate(const CastPlan* plan, const How* given, const float* a, int64_t a_outer, int64_t a_inner, const float* b,
                   int64_t b_outer, int64_t b_inner, float* c, int64_t m, int64_t n, int64_t k, int64_t chunk, int threads) {
  const int64_t row_panels = (m + kRows - 1) / kRows, column_panels = (n + kColumns - 1) / kColumns;
  std::vector<float> packed_a(size_t(row_panels * kRows * k) + 16), packed_b(size_t(column_panels * kColumns * k) + 16);
  std::vector<Range> range_a(row_panels), range_b(column_panels);
  const How& how = *given;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < row_panels; ++i)
      range_a[i] = pack(a + i * kRows * a_outer, a_outer, a_inner, kRows, std::min<int64_t>(kRows, m - i * kRows), k,
                        &packed_a[size_t(i * kRows * k)]);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < column_panels; ++j)
      range_b[j] = pack(b + j * kColumns * b_outer, b_outer, b_inner, kColumns, std::min<int64_t>(kColumns, n - j * kColumns),
                        k, &packed_b[size_t(j * kColumns * k)]);
  }
  const double limit = room(*plan, how, k, chunk);
  // Rows are taken in groups whose panels stay in the second-level cache while those of the columns pass by.
  const int64_t group = std::max<int64_t>(4, kGroupFloats / (kRows * std::max<int64_t>(k, 1)));
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t task = 0; task < row_panels * column_panels; ++task) {
    const int64_t first = task / (group * column_panels) * group, size = std::min(group, row_panels - first);
    const int64_t place = task - first * column_panels, i = first + place % size, j = place / size;
    __m512 total[kRows][2];
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    const int64_t rows = std::min<int64_t>(kRows, m - i * kRows), columns = std::min<int64_t>(kColumns, n - j * kColumns);
    const float *panel_a = &packed_a[size_t(i * kRows * k)], *panel_b = &packed_b[size_t(j * kColumns * k)];
    const double smallest = quantum_of(range_a[i].bottom, how.a_bits) * quantum_of(range_b[j].bottom, how.b_bits);
    const bool has_room = double(range_a[i].top) * range_b[j].top < limit;  // false for NaN
    const bool is_clear = has_room && std::max(smallest, how.smallest_product) >= how.least_sum;
    if (how.is_general)
      general_of(how, is_clear)(panel_a, panel_b, k, chunk, *plan, how, how.first_element + i * kRows * n + j * kColumns, n,
                                int(rows), total);
    else
      on_path(path_of(how, *plan, has_room, is_clear), Panels{how.is_rounded_product != 0, panel_a, panel_b, k, chunk, *plan, total[0]});
    const __mmask16 left = __mmask16((1u << std::min<int64_t>(16, columns)) - 1);
    const __mmask16 right = columns > 16 ? __mmask16((1u << (columns - 16)) - 1) : __mmask16(0);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = c + (i * kRows + r) * n + j * kColumns;
      _mm512_mask_storeu_ps(row, left, total[r][0]);
      _mm512_mask_storeu_ps(row + 16, right, total[r][1]);
    }
  }
}

}  // extern "C"

#else

extern "C" int lp_accumulate_is_supported() { return 0; }

#endif
