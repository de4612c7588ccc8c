// Aligned sums: a chunk of products and the running sum added at once in fixed point, as the matrix units of GPUs do.
// runtime/numerics/reference_aligned.py is the definition; this gives its bits.
//
//   c = 0; for each chunk: E = max(e_c, e_a + e_b of each product);  c = T(cut(c) + sum of cut(a b))
//
// where `cut` gives the multiple of 2^(E-F) toward zero, and T has the accumulator's fraction bits.
//
// Two loops, each first over the exponents of a chunk and then over its products:
//
//   fixed   `cut` is the conversion to integers of a b 2^(F-E), which is exact, as is the sum of integers: in float and
//           int32 where a sum of a chunk has at most 24 bits, else in double and int64. For finite values, so far from the
//           ends of fp32's range that T meets neither Inf nor subnormals.
//   plain   in double alone, for all values; Inf and NaN are those of an ordinary sum beside it.
//
// Vectors are those of GCC and Clang, which split them for a CPU that has shorter ones.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "bits.h"

namespace {

// Mirrors AlignedPlan of accumulate_aligned.py.
struct AlignedPlan {
  int32_t align, mantissa, chunk;  // F, the fraction bits of the accumulator, L
  int32_t a_emin, b_emin;          // the lowest exponents of the formats of the operands
};

template <class T>
struct Free {
  void operator()(T* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free<T>>;

template <class T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, size_t(count) * sizeof(T) / 64 * 64 + 64)));
}

inline double power_of_two(int e) { return double_of(uint64_t(e + 1023) << 52); }

inline bool is_finite(double v) { return std::fabs(v) <= std::numeric_limits<double>::max(); }

// One operand, its elements at outer * (row or column) + inner * k.
struct Operand {
  const float* values;
  int64_t outer, inner, count;
  int emin;
};

// K is laid out chunk by chunk, each as long as `padded`, a multiple of 4, and filled with zeros.
struct Chunks {
  int64_t size, padded, count, num_k;
  Chunks(int64_t chunk, int64_t k) : size(std::max<int64_t>(1, std::min(chunk, k))), padded((size + 3) / 4 * 4), num_k(k) {
    count = (k + size - 1) / size;
  }
  int64_t length() const { return count * padded; }
};

// Calls each(place, values) for the W values of every place of a group of rows or columns.
template <int W, class Each>
void walk(const Operand& x, int64_t group, const Chunks& chunks, Each each) {
  const int64_t width = std::min<int64_t>(W, x.count - group * W);
  const float* first = x.values + group * W * x.outer;
  float values[W] = {};
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t filled = std::min(chunks.size, chunks.num_k - chunk * chunks.size);
    for (int64_t l = 0; l < chunks.padded; ++l) {
      const float* from = first + (chunk * chunks.size + l) * x.inner;
      for (int64_t j = 0; j < width; ++j) values[j] = l < filled ? from[j * x.outer] : 0.0f;
      each(chunk * chunks.padded + l, values);
    }
  }
}

// ---- fixed

constexpr int kRows = 4, kBlock = 16;  // rows that are multiplied at once, and groups of them that share columns in cache
constexpr int kZero = -8000;           // the exponent of a zero operand: below every E with whatever is added
constexpr int kInfinite = 4000;        // of Inf and NaN
constexpr int kNone = 10000;           // the lowest exponent where all is zero

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef int32_t Int;
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  static constexpr int kFraction = 23, kBias = 127;
};

template <>
struct Lanes<double> {
  typedef int64_t Int;
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t Ints __attribute__((vector_size(64)));
  static constexpr int kFraction = 52, kBias = 1023;
};

typedef int16_t Shorts __attribute__((vector_size(64)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// The exponents of the values of an operand that are not zero.
struct Range {
  int low = kNone, high = kZero;
};

inline int exponent_of(float x, int emin) {
  const int32_t bits = int32_t(bits_of(x));
  const int field = bits >> 23 & 255;
  return x == 0.0f ? kZero : field == 255 ? kInfinite : std::max(field - 127, emin);
}

// Both operands: [group of kRows or kColumns][place][kRows or kColumns] of values, and as many exponents beside one another
// as fill a lane of T: [group][places of a lane][kRows or kColumns][kPlaces] of int16.
template <class T>
struct Packed {
  static constexpr int kColumns = 64 / sizeof(T), kPlaces = sizeof(T) / 2;
  Buffer<T> rows, columns;
  Buffer<int16_t> row_exponents, column_exponents;
  Range of_rows, of_columns;
  int64_t row_groups, column_groups;

  Packed(const Operand& a, const Operand& b, const Chunks& chunks, int threads) {
    row_groups = (a.count + kRows - 1) / kRows;
    column_groups = (b.count + kColumns - 1) / kColumns;
    rows = allocate<T>(row_groups * chunks.length() * kRows);
    row_exponents = allocate<int16_t>(row_groups * chunks.length() * kRows);
    columns = allocate<T>(column_groups * chunks.length() * kColumns);
    column_exponents = allocate<int16_t>(column_groups * chunks.length() * kColumns);
#pragma omp parallel num_threads(threads)
    {
      Range left, right;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < row_groups; ++i) pack<kRows>(a, i, chunks, &rows[0], &row_exponents[0], left);
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < column_groups; ++j) pack<kColumns>(b, j, chunks, &columns[0], &column_exponents[0], right);
#pragma omp critical
      for (auto [all, part] : {std::pair(&of_rows, &left), std::pair(&of_columns, &right)}) {
        all->low = std::min(all->low, part->low);
        all->high = std::max(all->high, part->high);
      }
    }
  }

  // Whether T meets no subnormal and no Inf, and floats hold every product and scale.
  bool is_inside(int align, int64_t k) const {
    int digits = 1;
    while (int64_t(1) << digits < k) ++digits;
    if (of_rows.high == kInfinite || of_columns.high == kInfinite) return false;
    if (of_rows.low == kNone || of_columns.low == kNone) return true;
    const int lowest = (sizeof(T) == 4 ? 2 * align : align) - 126;
    return of_rows.low + of_columns.low >= lowest && of_rows.high + of_columns.high + 2 + digits <= 126;
  }

 private:
  template <int W>
  static void pack(const Operand& x, int64_t group, const Chunks& chunks, T* values, int16_t* exponents, Range& range) {
    values += group * chunks.length() * W;
    exponents += group * chunks.length() * W;
    Range found = range;
    walk<W>(x, group, chunks, [&](int64_t place, const float* from) {
      int16_t* to = exponents + place / kPlaces * kPlaces * W + place % kPlaces;
      for (int j = 0; j < W; ++j) {
        const int e = exponent_of(from[j], x.emin);
        found.low = std::min(found.low, e == kZero ? kNone : e);
        found.high = std::max(found.high, e);
        values[place * W + j] = T(from[j]);
        to[j * kPlaces] = int16_t(e);
      }
    });
    range = found;
  }
};

// c (groups, kRows, kColumns), which begins as zeros, of some groups of rows and one of columns.
template <class T>
void multiply_block(const Packed<T>& packed, const Chunks& chunks, const AlignedPlan& plan, int64_t row_group, int64_t groups,
                    int64_t column_group, T* c) {
  typedef typename Lanes<T>::V V;
  typedef typename Lanes<T>::Ints Ints;
  typedef typename Lanes<T>::Int Int;
  constexpr int kColumns = Packed<T>::kColumns, kPlaces = Packed<T>::kPlaces, kBits = 8 * sizeof(T);
  constexpr int kFraction = Lanes<T>::kFraction, kBias = Lanes<T>::kBias;
  const Int kept = Int(-1) << (kFraction - plan.mantissa), align = plan.align;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = ((row_group + group) * chunks.count + chunk) * chunks.padded * kRows;
      const int64_t column = (column_group * chunks.count + chunk) * chunks.padded * kColumns;
      const T *x = &packed.rows[row], *y = &packed.columns[column];
      const int16_t *x_exponents = &packed.row_exponents[row], *y_exponents = &packed.column_exponents[column];
      T* sums = c + group * kRows * kColumns;
      Shorts top[kRows];
      for (int r = 0; r < kRows; ++r) top[r] = Shorts{} + int16_t(2 * kZero);
      for (int64_t k = 0; k < chunks.padded; k += kPlaces) {
        const Shorts of_y = load<Shorts>(y_exponents + k * kColumns);
        for (int r = 0; r < kRows; ++r) {
          const Shorts e = of_y + Shorts(Ints{} + load<Int>(x_exponents + k * kRows + r * kPlaces));
          top[r] = top[r] > e ? top[r] : e;
        }
      }
      V scale[kRows], unit[kRows];
      Ints fixed[kRows];
      for (int r = 0; r < kRows; ++r) {
        const V sum = load<V>(sums + r * kColumns);
        Ints e = (Ints(sum) >> kFraction & (2 * kBias + 1)) - kBias;
        for (int place = 0; place < kPlaces; ++place) {
          const Ints of_place = Ints(top[r]) << (kBits - 16 * (place + 1)) >> (kBits - 16);
          e = e > of_place ? e : of_place;
        }
        e = e > align - 126 ? e : Ints{} + (align - 126);  // below it all products are 0, and nothing of c is cut
        scale[r] = V((align + kBias - e) << kFraction);
        unit[r] = V((e + kBias - align) << kFraction);
        fixed[r] = __builtin_convertvector(sum * scale[r], Ints);
      }
      for (int64_t k = 0; k < chunks.padded; ++k) {
        const V of_y = load<V>(y + k * kColumns);
        for (int r = 0; r < kRows; ++r) fixed[r] += __builtin_convertvector(of_y * x[k * kRows + r] * scale[r], Ints);
      }
      for (int r = 0; r < kRows; ++r) {
        const Ints sum = Ints(__builtin_convertvector(fixed[r], V) * unit[r]) & kept;
        std::memcpy(sums + r * kColumns, &sum, sizeof(V));
      }
    }
}

// False, and nothing is done, where the values need the plain loop.
template <class T>
bool multiply_fixed(const Operand& a, const Operand& b, const Chunks& chunks, const AlignedPlan& plan, float* c, int threads) {
  constexpr int kColumns = Packed<T>::kColumns;
  const Packed<T> packed(a, b, chunks, threads);
  if (!packed.is_inside(plan.align, chunks.num_k)) return false;
  const int64_t blocks = (packed.row_groups + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < blocks * packed.column_groups; ++task) {
    const int64_t row = task / packed.column_groups * kBlock, column = task % packed.column_groups;
    const int64_t groups = std::min<int64_t>(kBlock, packed.row_groups - row);
    alignas(64) T sums[kBlock * kRows * kColumns] = {};
    multiply_block<T>(packed, chunks, plan, row, groups, column, sums);
    const int64_t height = std::min(groups * kRows, a.count - row * kRows);
    const int64_t width = std::min<int64_t>(kColumns, b.count - column * kColumns);
    for (int64_t r = 0; r < height; ++r)
      for (int64_t l = 0; l < width; ++l)
        c[(row * kRows + r) * b.count + column * kColumns + l] = float(sums[r * kColumns + l]);
  }
  return true;
}

// In float where fp32 holds the sum of a chunk in fixed point, else in double.
bool multiply_fixed(const Operand& a, const Operand& b, const Chunks& chunks, const AlignedPlan& plan, float* c, int threads) {
  if (a.emin < -126 || b.emin < -126) return false;
  const bool is_narrow = (chunks.size * 4 + 2) << plan.align <= int64_t(1) << 24;
  return is_narrow ? multiply_fixed<float>(a, b, chunks, plan, c, threads)
                   : multiply_fixed<double>(a, b, chunks, plan, c, threads);
}

// ---- plain

constexpr int kColumns = 16;

// [group of W][place][W] of values, and of the powers of two of their exponents: 0 of a zero.
template <int W>
struct Panels {
  Buffer<double> values, powers;
  int64_t groups;
  Panels(const Operand& x, const Chunks& chunks) : groups((x.count + W - 1) / W) {
    values = allocate<double>(groups * W * chunks.length());
    powers = allocate<double>(groups * W * chunks.length());
  }
  void pack(int64_t group, const Operand& x, const Chunks& chunks) {
    const int64_t first = group * W * chunks.length();
    walk<W>(x, group, chunks, [&](int64_t place, const float* from) {
      for (int j = 0; j < W; ++j) {
        const double v = from[j];
        const int e = std::max(int(bits_of(v) >> 52 & 2047) - 1023, x.emin);
        values[first + place * W + j] = v;
        powers[first + place * W + j] = v == 0.0 || !is_finite(v) ? 0.0 : power_of_two(e);
      }
    });
  }
};

// T: of a finite v.
inline double rounded(double v, int mantissa) {
  const double size = std::fabs(v), steps = power_of_two(126 + mantissa);
  const double normal = double_of(bits_of(size) & ~uint64_t(0) << (52 - mantissa));
  const double q = size < 0x1p-126 ? std::trunc(size * steps) / steps : normal;
  return std::copysign(q >= 0x1p128 ? std::numeric_limits<double>::infinity() : q, v);
}

void multiply_row(const double* a, const double* a_powers, const double* b, const double* b_powers, const Chunks& chunks,
                  const AlignedPlan& plan, double* total) {
  const double digits = power_of_two(plan.align);
  const int mantissa = plan.mantissa;
  const uint64_t field = uint64_t(2047) << 52;
  std::fill(total, total + kColumns, 0.0);
  for (int64_t start = 0; start < chunks.length(); start += chunks.padded) {
    double top[kColumns], scale[kColumns], fixed[kColumns], ordinary[kColumns];
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) top[j] = std::max(double_of(bits_of(total[j]) & field), 0x1p-126);
    for (int64_t k = start; k < start + chunks.padded; ++k)
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) top[j] = std::max(top[j], a_powers[k] * b_powers[k * kColumns + j]);
#pragma omp simd
    for (int j = 0; j < kColumns; ++j) {
      scale[j] = digits / top[j];
      fixed[j] = std::trunc(total[j] * scale[j]);
      ordinary[j] = total[j];
    }
    for (int64_t k = start; k < start + chunks.padded; ++k)
#pragma omp simd
      for (int j = 0; j < kColumns; ++j) {
        const double product = a[k] * b[k * kColumns + j];
        fixed[j] += std::trunc(product * scale[j]);
        ordinary[j] += product;
      }
#pragma omp simd
    for (int j = 0; j < kColumns; ++j)
      total[j] = is_finite(ordinary[j]) ? rounded((fixed[j] + 0.0) / scale[j], mantissa) : ordinary[j];
  }
}

void multiply_plain(const Operand& a, const Operand& b, const Chunks& chunks, const AlignedPlan& plan, float* c, int threads) {
  const int64_t length = chunks.length();
  Panels<1> left(a, chunks);
  Panels<kColumns> right(b, chunks);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < left.groups; ++i) left.pack(i, a, chunks);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < right.groups; ++j) right.pack(j, b, chunks);
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < left.groups * right.groups; ++task) {
      const int64_t i = task % left.groups, j = task / left.groups;
      const int64_t row = i * length, column = j * length * kColumns;
      double total[kColumns];
      multiply_row(&left.values[row], &left.powers[row], &right.values[column], &right.powers[column], chunks, plan, total);
      for (int64_t l = 0; l < std::min<int64_t>(kColumns, b.count - j * kColumns); ++l)
        c[i * b.count + j * kColumns + l] = float(total[l]);
    }
  }
}

}  // namespace

extern "C" {

// c: [m, n] fp32, row-major. a: element (m, k) at outer m + inner k; b: element (k, n) at outer n + inner k; both fp32.
void lp_accumulate_aligned(const AlignedPlan* plan, const float* a, int64_t a_outer, int64_t a_inner, const float* b,
                           int64_t b_outer, int64_t b_inner, float* c, int64_t m, int64_t n, int64_t k, int threads) {
  const Operand lhs{a, a_outer, a_inner, m, plan->a_emin}, rhs{b, b_outer, b_inner, n, plan->b_emin};
  const Chunks chunks(plan->chunk, k);
  if (!multiply_fixed(lhs, rhs, chunks, *plan, c, threads)) multiply_plain(lhs, rhs, chunks, *plan, c, threads);
}
}
