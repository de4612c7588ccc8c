// Rotate: the randomized Hadamard transform of runtime/numerics/hadamard.py, bit for bit.
//
// Along the columns of a [rows, columns] matrix n elements are n / 16 vectors: a stage h < 16 adds a vector to its own
// lanes moved by h, later stages add vectors to one another. Along the rows of a matrix each stage adds rows, 16 columns at
// a time. What n does not divide is turned in the powers of two it is made of. Every value goes through the same additions
// in either layout, whatever the vectors are: the compiler splits those of 16 for a CPU that has shorter ones.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bits.h"
#include "loads.h"

namespace {

constexpr int kLanes = 16, kMost = 128;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

template <class In>
inline Vector load(const typename In::Storage* x, int64_t count = kLanes) {
  alignas(64) float values[kLanes] = {};
  if (count == kLanes)
    for (int i = 0; i < kLanes; ++i) values[i] = In::load(x[i]);
  else
    for (int64_t i = 0; i < count; ++i) values[i] = In::load(x[i]);
  Vector v;
  std::memcpy(&v, values, sizeof v);
  return v;
}

inline uint16_t bf16_of(float v) {
  const uint32_t bits = bits_of(v);
  return v != v ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline void store(Vector v, void* out, int64_t at, bool is_bf16, int64_t count = kLanes) {
  alignas(64) float values[kLanes];
  std::memcpy(values, &v, sizeof v);
  if (!is_bf16) {
    if (count == kLanes)
      std::memcpy(static_cast<float*>(out) + at, values, sizeof v);
    else
      std::memcpy(static_cast<float*>(out) + at, values, size_t(count) * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + at;
  if (count == kLanes)
    for (int i = 0; i < kLanes; ++i) to[i] = bf16_of(values[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = bf16_of(values[i]);
}

// Lanes i and i + H, where bit H of i is 0, become a + b and a - b.
template <int H>
inline Vector stage(Vector x) {
#define LP_MOVED(i) ((i) ^ H)
#ifdef __clang__
  const Vector other = __builtin_shufflevector(x, x, LP_MOVED(0), LP_MOVED(1), LP_MOVED(2), LP_MOVED(3), LP_MOVED(4), LP_MOVED(5),
                                               LP_MOVED(6), LP_MOVED(7), LP_MOVED(8), LP_MOVED(9), LP_MOVED(10), LP_MOVED(11),
                                               LP_MOVED(12), LP_MOVED(13), LP_MOVED(14), LP_MOVED(15));
#else
  const Mask moved = {LP_MOVED(0), LP_MOVED(1), LP_MOVED(2), LP_MOVED(3), LP_MOVED(4), LP_MOVED(5), LP_MOVED(6), LP_MOVED(7),
                      LP_MOVED(8), LP_MOVED(9), LP_MOVED(10), LP_MOVED(11), LP_MOVED(12), LP_MOVED(13), LP_MOVED(14), LP_MOVED(15)};
  const Vector other = __builtin_shuffle(x, moved);
#endif
#undef LP_MOVED
  const Mask lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (lane & H) == 0 ? x + other : other - x;
}

// The stages between vectors, n / 16 of them.
inline void stages_between(Vector* v, int count) {
  for (int h = 1; h < count; h *= 2)
    for (int i = 0; i < count; i += 2 * h)
      for (int j = i; j < i + h; ++j) {
        const Vector a = v[j], b = v[j + h];
        v[j] = a + b;
        v[j + h] = a - b;
      }
}

inline float share(int n) { return float(1.0 / std::sqrt(double(n))); }

// A short part of a row, n < 16 elements.
template <class In>
void turn_few(const typename In::Storage* x, void* out, int64_t at, bool is_bf16, int n, const float* signs) {
  alignas(64) float values[kLanes] = {};
  for (int i = 0; i < n; ++i) values[i] = In::load(x[at + i]) * signs[i];
  for (int h = 1; h < n; h *= 2)
    for (int i = 0; i < n; i += 2 * h)
      for (int j = i; j < i + h; ++j) {
        const float a = values[j], b = values[j + h];
        values[j] = a + b;
        values[j + h] = a - b;
      }
  Vector v;
  std::memcpy(&v, values, sizeof v);
  store(v * share(n), out, at, is_bf16, n);
}

template <class In, int N>
inline void turn_row(const typename In::Storage* x, void* out, int64_t at, bool is_bf16, const Vector* signs) {
  constexpr int count = N / kLanes;
  Vector v[count];
  for (int i = 0; i < count; ++i) v[i] = stage<8>(stage<4>(stage<2>(stage<1>(load<In>(x + at + i * kLanes) * signs[i]))));
  stages_between(v, count);
  const float scale = share(N);
  for (int i = 0; i < count; ++i) store(v[i] * scale, out, at + i * kLanes, is_bf16);
}

template <class In>
inline void turn_row(const typename In::Storage* x, void* out, int64_t at, bool is_bf16, int n, const Vector* signs) {
  if (n == 16) turn_row<In, 16>(x, out, at, is_bf16, signs);
  else if (n == 32) turn_row<In, 32>(x, out, at, is_bf16, signs);
  else if (n == 64) turn_row<In, 64>(x, out, at, is_bf16, signs);
  else turn_row<In, 128>(x, out, at, is_bf16, signs);
}

// Calls each(begin, n) for the parts of an axis that are turned together.
template <class Each>
void walk(int64_t length, int size, Each each) {
  int64_t at = 0;
  for (; at + size <= length; at += size) each(at, size);
  for (int n = size / 2; n; n /= 2)
    if (length - at >= n) {
      each(at, n);
      at += n;
    }
}

template <class In>
void rotate_rows(const typename In::Storage* x, void* out, bool is_bf16, int64_t begin, int64_t end, int64_t columns, int size,
                 const float* signs) {
  Vector held[kMost / kLanes];
  std::memcpy(held, signs, size_t(size) * 4);
  for (int64_t row = begin; row < end; ++row)
    walk(columns, size, [&](int64_t first, int n) {
      const int64_t at = row * columns + first;
      n < kLanes ? turn_few<In>(x, out, at, is_bf16, n, signs) : turn_row<In>(x, out, at, is_bf16, n, held);
    });
}

// Rows [first, first + n) of one matrix.
template <class In>
void rotate_band(const typename In::Storage* x, void* out, bool is_bf16, int64_t first, int n, int64_t columns, const float* signs) {
  Vector v[kMost];
  const float scale = share(n);
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, columns - column), at = first * columns + column;
    if (width == kLanes)
      for (int i = 0; i < n; ++i) v[i] = load<In>(x + at + i * columns) * signs[i];
    else
      for (int i = 0; i < n; ++i) v[i] = load<In>(x + at + i * columns, width) * signs[i];
    stages_between(v, n);
    if (width == kLanes)
      for (int i = 0; i < n; ++i) store(v[i] * scale, out, at + i * columns, is_bf16);
    else
      for (int i = 0; i < n; ++i) store(v[i] * scale, out, at + i * columns, is_bf16, width);
  }
}

template <class In>
void rotate(const void* x, void* out, bool is_bf16, int64_t matrices, int64_t rows, int64_t columns, bool is_column, int size,
            const float* signs, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  if (!is_column) {
    const int64_t count = matrices * rows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; ++part)
      rotate_rows<In>(typed, out, is_bf16, count * part / threads, count * (part + 1) / threads, columns, size, signs);
    return;
  }
  const int64_t whole = rows / size, bands = whole + (rows % size != 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < matrices * bands; ++item) {
    const int64_t base = item / bands * rows, band = item % bands;
    if (band < whole)
      rotate_band<In>(typed, out, is_bf16, base + band * size, size, columns, signs);
    else
      walk(rows % size, size, [&](int64_t first, int n) {
        rotate_band<In>(typed, out, is_bf16, base + whole * size + first, n, columns, signs);
      });
  }
}

}  // namespace

extern "C" {

// dtype: 0 fp32, 1 bf16, 2 fp16; out: fp32, or bf16, of the [matrices, rows, columns] of x and apart from it. is_column: along
// the rows of each matrix, else along the columns. signs: `size` of them, 1 or -1; size: 16, 32, 64 or 128.
void lp_rotate(const void* x, int dtype, void* out, int is_bf16, int64_t matrices, int64_t rows, int64_t columns, int is_column,
               int size, const float* signs, int threads) {
  const auto run = dtype == 0 ? rotate<Fp32> : dtype == 1 ? rotate<Bf16> : rotate<Fp16>;
  run(x, out, is_bf16, matrices, rows, columns, is_column, size, signs, threads);
}

}  // extern "C"
