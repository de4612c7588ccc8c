// Accumulate in wide lanes: what accumulate.cpp does for the sums that fp32 lanes cannot hold, in double, and for integers, in
// int64. Any accumulator, rounding, product and model; the order and the rounding are those of runtime/numerics/reference_gemm.py:
//
//   total = 0; for each chunk of K: part = 0; for k in the chunk: part = Q(part + a b);  total = Q(total + part)
//
// Products of fp32 values are exact in double. A sum is rounded to odd there, and Q of that is Q of the exact sum.
// Plain C++17; the compiler makes vectors of the loops over the columns. Needs -ffp-contract=off.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bits.h"
#include "philox.h"

namespace {

constexpr int kColumns = 32;

// Mirrors WidePlan of accumulate_wide.py: the accumulator and how it is reached.
struct WidePlan {
  double tiny, first_tie, max;  // the smallest value, what rounds away from zero to it from, the largest value
  double top, chunk_top;        // what a sum beyond the largest value gives, and one of fp32 in a chunk
  int64_t low, high, wraps;     // integers: the ends, and whether sums wrap there
  int32_t is_integer, emin, mantissa, has_gap, has_negative_zero;
  int32_t mode;  // 0 nearest_even, 1 nearest_away, 2 toward_zero, 3 stochastic
  int32_t is_rounded_product, is_per_chunk, digits;
  int64_t first_element, num_elements;
  RandomPlan random;
};

enum Mode { kEven, kAway, kCut, kChance };

constexpr uint64_t kSign = uint64_t(1) << 63;

// x + y rounded to odd: the sum and its exact error; an even sum with an error moves one step towards it.
inline double add_to_odd(double x, double y) {
  const double s = x + y, back = s - x, error = (x - (s - back)) + (y - back);
  const uint64_t bits = bits_of(s);
  const bool is_moved = error != 0.0 && std::fabs(error) <= 1.7976931348623157e308 && (bits & 1) == 0;
  const uint64_t step = (error > 0.0) == (s > 0.0) ? uint64_t(1) : ~uint64_t(0);
  return double_of(bits + (is_moved ? step : 0));
}

// Q(s). `draw`: the random digits of kChance.
template <Mode M>
inline double rounded(double s, uint32_t draw, const WidePlan& p) {
  const uint64_t bits = bits_of(s), size_bits = bits & ~kSign;
  const double a = double_of(size_bits);
  const uint64_t lowest = uint64_t(p.emin + 1023), field = size_bits >> 52, held = field < lowest ? lowest : field;
  const bool is_gap = p.has_gap && a < p.tiny;
  const double power = double_of((held - uint64_t(p.mantissa)) << 52);  // of a finite sum the spacing of its neighbours
  const double inverse = double_of((uint64_t(2046 + p.mantissa) - held) << 52);
  const double ulp = is_gap ? p.tiny : power;
  const double steps = is_gap ? 0.0 : std::floor(a * inverse), below = steps * ulp, rest = a - below;
  const double tie = is_gap ? p.first_tie : 0.5 * ulp;
  bool is_up = false;
  if (M == kEven) is_up = rest > tie || (rest == tie && std::floor(steps * 0.5) * 2.0 != steps);
  if (M == kAway) is_up = rest >= tie;
  if (M == kChance) {
    const double all = double(1 << p.digits);
    is_up = rest * all >= ulp * (all - draw);
  }
  double q = below + (is_up ? ulp : 0.0);
  if (M == kCut && p.top > p.max) q = q > p.max && field < 2047 ? p.max : q;  // finite sums do not reach Inf toward zero
  q = q > p.max || field == 2047 ? p.top : q;
  const double result = double_of(bits_of(q) | (bits & kSign));
  const double kept = p.has_negative_zero ? result : result + 0.0;
  return s != s ? s : kept;
}

// The nearest fp32 of s, which was rounded to odd; beyond the largest chunk_top.
inline double to_fp32(double s, const WidePlan& p) {
  const double q = double(float(s));
  return std::fabs(q) > 3.4028234663852886e38 ? std::copysign(p.chunk_top, s) : q;
}

// The draws of one kind of rounding for the columns of a row; see reference.py for which bits they are.
class Draws {
 public:
  Draws(const WidePlan& plan, int64_t element, int64_t width) : plan_(plan), element_(element), width_(width) {}
  void move_to(int64_t number) {
    if (number / 8 != group_) {
      group_ = number / 8;
      philox(plan_.random, group_ * plan_.num_elements + element_, width_, words_);
    }
    const int64_t word = number % 8 / 2, shift = 16 * (number % 2);
    for (int j = 0; j < kColumns; ++j) draw_[j] = (words_[4 * j + word] >> shift & 0xffffu) >> (16 - plan_.digits);
  }
  uint32_t of(int j) const { return draw_[j]; }

 private:
  const WidePlan& plan_;
  const int64_t element_, width_;
  int64_t group_ = -1;
  uint32_t words_[4 * kColumns + 128] = {}, draw_[kColumns] = {};
};

// One row of `a` times a panel of columns.
template <Mode M, bool RoundedProduct, bool PerChunk>
void multiply_row(const double* a, const double* b, int64_t num_k, int64_t chunk, const WidePlan& plan, int64_t element,
                  int64_t width, double* total) {
  const WidePlan p = plan;
  const int64_t num_chunks = (num_k + chunk - 1) / chunk, first_outer = PerChunk ? num_chunks : num_k;
  Draws inner(p, element, width), outer(p, element, width), products(p, element, width);
  std::fill(total, total + kColumns, 0.0);
  for (int64_t start = 0, index = 0; start < num_k; start += chunk, ++index) {
    double part[kColumns] = {};
    for (int64_t k = start; k < std::min(start + chunk, num_k); ++k) {
      const double x = a[k];
      const double* column = b + k * kColumns;
      if (M == kChance && !PerChunk) inner.move_to(k);
      if (M == kChance && RoundedProduct) products.move_to(first_outer + num_chunks + k);
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) {
        const double exact = x * column[j], y = RoundedProduct ? rounded<M>(exact, products.of(j), p) : exact;
        const double sum = add_to_odd(part[j], y);
        part[j] = PerChunk ? to_fp32(sum, p) : rounded<M>(sum, inner.of(j), p);
      }
    }
    if (M == kChance && PerChunk) inner.move_to(index);
    if (M == kChance && num_chunks > 1) outer.move_to(first_outer + index);
    for (int j = 0; j < kColumns; ++j) {
      if (PerChunk) part[j] = rounded<M>(part[j], inner.of(j), p);
      total[j] = num_chunks == 1 ? part[j] : rounded<M>(add_to_odd(total[j], part[j]), outer.of(j), p);
    }
  }
}

using MultiplyRow = decltype(&multiply_row<kEven, false, false>);

template <Mode M>
MultiplyRow row_of(const WidePlan& p) {
  if (p.is_rounded_product) return p.is_per_chunk ? multiply_row<M, true, true> : multiply_row<M, true, false>;
  return p.is_per_chunk ? multiply_row<M, false, true> : multiply_row<M, false, false>;
}

MultiplyRow row_of(const WidePlan& p) {
  return p.mode == kEven ? row_of<kEven>(p) : p.mode == kAway ? row_of<kAway>(p) : p.mode == kCut ? row_of<kCut>(p) : row_of<kChance>(p);
}

// Integers: exact but for the ends.
inline int64_t cut(int64_t x, const WidePlan& p) {
  return p.wraps ? ((x - p.low) & (p.high - p.low)) + p.low : std::min(std::max(x, p.low), p.high);
}

void multiply_integer_row(const int64_t* a, const int64_t* b, int64_t num_k, int64_t chunk, const WidePlan& plan, int64_t,
                          int64_t, int64_t* total) {
  const WidePlan p = plan;
  std::fill(total, total + kColumns, 0);
  for (int64_t start = 0; start < num_k; start += chunk) {
    int64_t part[kColumns] = {};
    for (int64_t k = start; k < std::min(start + chunk, num_k); ++k)
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) {
        const int64_t exact = a[k] * b[k * kColumns + j], sum = part[j] + (p.is_rounded_product ? cut(exact, p) : exact);
        part[j] = p.is_per_chunk ? sum : cut(sum, p);
      }
    for (int j = 0; j < kColumns; ++j) total[j] = cut(total[j] + cut(part[j], p), p);
  }
}

template <class T, class Row>
void multiply(Row row, const WidePlan& plan, const float* a, int64_t a_outer, int64_t a_inner, const float* b, int64_t b_outer,
              int64_t b_inner, float* c, int64_t m, int64_t n, int64_t k, int64_t chunk, int threads) {
  const int64_t panels = (n + kColumns - 1) / kColumns;
  std::vector<T> packed_a(size_t(m * k)), packed_b(size_t(panels * kColumns * k));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < k; ++j) packed_a[i * k + j] = T(a[i * a_outer + j * a_inner]);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t width = std::min<int64_t>(kColumns, n - j * kColumns);
      for (int64_t i = 0; i < k; ++i)
        for (int64_t l = 0; l < width; ++l)
          packed_b[(j * k + i) * kColumns + l] = T(b[(j * kColumns + l) * b_outer + i * b_inner]);
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < panels * m; ++task) {
      const int64_t i = task % m, j = task / m, width = std::min<int64_t>(kColumns, n - j * kColumns);
      const int64_t element = plan.first_element + i * n + j * kColumns;
      T total[kColumns];
      row(&packed_a[size_t(i * k)], &packed_b[size_t(j * k * kColumns)], k, chunk, plan, element, width, total);
      for (int64_t l = 0; l < width; ++l) c[i * n + j * kColumns + l] = float(total[l]);
    }
  }
}

}  // namespace

extern "C" {

// c: [m, n] fp32, row-major. a: element (m, k) at outer m + inner k; b: element (k, n) at outer n + inner k; both fp32.
void lp_accumulate_wide(const WidePlan* plan, const float* a, int64_t a_outer, int64_t a_inner, const float* b, int64_t b_outer,
                        int64_t b_inner, float* c, int64_t m, int64_t n, int64_t k, int64_t chunk, int threads) {
  if (plan->is_integer)
    multiply<int64_t>(multiply_integer_row, *plan, a, a_outer, a_inner, b, b_outer, b_inner, c, m, n, k, chunk, threads);
  else
    multiply<double>(row_of(*plan), *plan, a, a_outer, a_inner, b, b_outer, b_inner, c, m, n, k, chunk, threads);
}
}
