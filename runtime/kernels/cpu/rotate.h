// Rotate: the randomized Hadamard transform of runtime/numerics/hadamard.py, bit for bit.
//
// Along the columns of a [rows, columns] matrix n elements are n / 16 vectors: a stage h < 16 adds a vector to its own
// lanes moved by h, later stages add vectors to one another. Along the rows of a matrix each stage adds rows, 16 columns at
// a time. What n does not divide is turned in the powers of two it is made of. Every value goes through the same additions
// in either layout, whatever the vectors are: the compiler splits those of 16 for a CPU that has shorter ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bits.h"
#include "loads.h"

namespace {

constexpr int kLanes = 16, kMost = 128;
constexpr int64_t kPiece = 8192;  // elements of some rows
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

// What a turned value is kept as: fp32, bf16, or rounded to bf16 and kept as fp32.
enum Turned { kWide, kNarrow, kRounded };

inline void store(Vector v, void* out, int64_t at, Turned kind, int64_t count = kLanes) {
  alignas(64) float values[kLanes];
  std::memcpy(values, &v, sizeof v);
  if (kind == kRounded)
    for (int i = 0; i < kLanes; ++i) values[i] = float_of(uint32_t(bf16_of(values[i])) << 16);
  if (kind != kNarrow) {
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
void turn_few(const typename In::Storage* x, void* out, int64_t at, Turned kind, int n, const float* signs) {
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
  store(v * share(n), out, at, kind, n);
}

template <class In, int N>
inline void turn_row(const typename In::Storage* x, void* out, int64_t at, Turned kind, const Vector* signs) {
  constexpr int count = N / kLanes;
  Vector v[count];
  for (int i = 0; i < count; ++i) v[i] = stage<8>(stage<4>(stage<2>(stage<1>(load<In>(x + at + i * kLanes) * signs[i]))));
  stages_between(v, count);
  const float scale = share(N);
  for (int i = 0; i < count; ++i) store(v[i] * scale, out, at + i * kLanes, kind);
}

template <class In>
inline void turn_row(const typename In::Storage* x, void* out, int64_t at, Turned kind, int n, const Vector* signs) {
  if (n == 16) turn_row<In, 16>(x, out, at, kind, signs);
  else if (n == 32) turn_row<In, 32>(x, out, at, kind, signs);
  else if (n == 64) turn_row<In, 64>(x, out, at, kind, signs);
  else turn_row<In, 128>(x, out, at, kind, signs);
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
void rotate_rows(const typename In::Storage* x, void* out, Turned kind, int64_t begin, int64_t end, int64_t columns, int size,
                 const float* signs) {
  Vector held[kMost / kLanes];
  std::memcpy(held, signs, size_t(size) * 4);
  for (int64_t row = begin; row < end; ++row)
    walk(columns, size, [&](int64_t first, int n) {
      const int64_t at = row * columns + first;
      n < kLanes ? turn_few<In>(x, out, at, kind, n, signs) : turn_row<In>(x, out, at, kind, n, held);
    });
}

// Rows [first, first + n) of one matrix.
template <class In>
void rotate_band(const typename In::Storage* x, void* out, Turned kind, int64_t first, int n, int64_t columns, const float* signs) {
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
      for (int i = 0; i < n; ++i) store(v[i] * scale, out, at + i * columns, kind);
    else
      for (int i = 0; i < n; ++i) store(v[i] * scale, out, at + i * columns, kind, width);
  }
}

// Rows [begin, end) of one matrix, turned along them: a band begins at a multiple of `size` and ends there or with the matrix.
// x and out: their first element.
template <class In>
void rotate_bands(const typename In::Storage* x, void* out, Turned kind, int64_t rows, int64_t columns, int size, const float* signs) {
  walk(rows, size, [&](int64_t first, int n) { rotate_band<In>(x, out, kind, first, n, columns, signs); });
}

// Mirrors TurnPlan of rotate.py: the transform before a cast. size 0: none.
struct TurnPlan {
  int32_t size, is_rounded;  // is_rounded: to bf16
  const float* signs;
};

// Turns an operand piece by piece into memory that stays in a cache, and gives each(x, begin, end) the rows [begin, end) of
// all matrices, of which the element at row r, column c is x[r columns + c]. Pieces are bands of `unit` rows, or of fewer at
// the end of a matrix, where turned along the rows, else some rows. parts: how many share the work, and which one this is.
template <class In, class Each>
void turn_pieces(const TurnPlan& turn, const typename In::Storage* x, int64_t matrices, int64_t rows, int64_t columns,
                 bool is_column, int64_t unit, int64_t part, int64_t num_parts, Each each) {
  const Turned kind = turn.is_rounded ? kRounded : kWide;
  unit = is_column ? unit : std::max<int64_t>(1, kPiece / columns);
  const int64_t bands = (rows + unit - 1) / unit, count = matrices * bands;
  std::vector<float> held(size_t(std::min(unit, rows) * columns));
  for (int64_t item = count * part / num_parts; item < count * (part + 1) / num_parts; ++item) {
    const int64_t begin = item / bands * rows + item % bands * unit, height = std::min(unit, rows - item % bands * unit);
    if (is_column)
      rotate_bands<In>(x + begin * columns, held.data(), kind, height, columns, turn.size, turn.signs);
    else
      rotate_rows<In>(x + begin * columns, held.data(), kind, 0, height, columns, turn.size, turn.signs);
    each(held.data() - begin * columns, begin, begin + height);
  }
}

}  // namespace
