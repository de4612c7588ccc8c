// Rows of a matrix whose rows or columns lie apart, into C order.
//
//   rows that lie side by side in memory (a transposed matrix) go through registers, 16 x 16 words at a time
//   others are read element by element
#pragma once

#include <algorithm>
#include <cstdint>

#include "transpose.h"

namespace {

template <class Word>
void copy_tile(const Word* x, Word* out, int64_t height, int64_t width, int64_t columns, int64_t row_stride, int64_t column_stride) {
  for (int64_t i = 0; i < height; ++i) {
    Word* __restrict to = out + i * columns;
    const Word* __restrict from = x + i * row_stride;
    if (column_stride == 2) {  // of a stride that it knows the compiler makes vectors
      for (int64_t j = 0; j < width; ++j) to[j] = from[2 * j];
    } else {
      for (int64_t j = 0; j < width; ++j) to[j] = from[j * column_stride];
    }
  }
}

// A tile of a transposed matrix: its columns are runs of memory.
template <class Word>
void transpose_tile(const Word* x, Word* out, int64_t height, int64_t width, int64_t columns, int64_t column_stride) {
#ifdef __AVX512F__
  if constexpr (sizeof(Word) == 4) {
    const int64_t rows = height & ~int64_t(15), wide = width & ~int64_t(15);
    for (int64_t j = 0; j < wide; j += 16)
      for (int64_t i = 0; i < rows; i += 16) {
        __m512i lanes[16];
        for (int k = 0; k < 16; ++k) lanes[k] = _mm512_loadu_si512(x + (j + k) * column_stride + i);
        transpose16(lanes);
        for (int k = 0; k < 16; ++k) _mm512_storeu_si512(out + (i + k) * columns + j, lanes[k]);
      }
    copy_tile(x + rows, out + rows * columns, height - rows, wide, columns, 1, column_stride);
    copy_tile(x + wide * column_stride, out + wide, height, width - wide, columns, 1, column_stride);
    return;
  }
#endif
  copy_tile(x, out, height, width, columns, 1, column_stride);
}

// `height` rows of `columns`; strides in elements.
template <class Word>
void copy_rows(const Word* x, Word* out, int64_t height, int64_t columns, int64_t row_stride, int64_t column_stride) {
  constexpr int64_t kWide = 64;  // columns of a tile that stays in the first-level cache
  if (row_stride != 1) return copy_tile(x, out, height, columns, columns, row_stride, column_stride);
  for (int64_t column = 0; column < columns; column += kWide)
    transpose_tile(x + column * column_stride, out + column, height, std::min(kWide, columns - column), columns, column_stride);
}

}  // namespace
