// Copies of matrices whose rows or columns lie apart, into C order. Plain C++17, called through ctypes by contiguous.py.

#include <algorithm>
#include <cstdint>

#include "huge_pages.h"
#include "strided.h"

namespace {

template <class Word>
void copy_all(const void* x, void* out, int64_t batch, int64_t rows, int64_t columns, int64_t batch_stride, int64_t row_stride,
              int64_t column_stride, int threads) {
  constexpr int64_t kBand = 64;
  const int64_t bands = (rows + kBand - 1) / kBand;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < batch * bands; ++item) {
    const int64_t row = item % bands * kBand;
    const Word* from = static_cast<const Word*>(x) + item / bands * batch_stride + row * row_stride;
    Word* to = static_cast<Word*>(out) + (item / bands * rows + row) * columns;
    copy_rows(from, to, std::min(kBand, rows - row), columns, row_stride, column_stride);
  }
}

}  // namespace

extern "C" {

// x: `batch` matrices of `bytes` 2, 4 or 8 an element, strides in elements; out: the same in C order.
void lp_contiguous(const void* x, void* out, int bytes, int64_t batch, int64_t rows, int64_t columns, int64_t batch_stride,
                   int64_t row_stride, int64_t column_stride, int threads) {
  ask_for_huge_pages(out, batch * rows * columns * bytes);
  const auto copy = bytes == 2 ? copy_all<uint16_t> : bytes == 4 ? copy_all<uint32_t> : copy_all<uint64_t>;
  copy(x, out, batch, rows, columns, batch_stride, row_stride, column_stride, threads);
}
}
