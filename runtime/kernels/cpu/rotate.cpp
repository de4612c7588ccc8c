// Rotate: the transform of rotate.h of a whole tensor.

#include <algorithm>
#include <cstdint>

#include "rotate.h"

namespace {

template <class In>
void rotate(const void* x, void* out, Turned kind, int64_t matrices, int64_t rows, int64_t columns, bool is_column, int size,
            const float* signs, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  if (!is_column) {
    const int64_t count = matrices * rows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; ++part)
      rotate_rows<In>(typed, out, kind, count * part / threads, count * (part + 1) / threads, columns, size, signs);
    return;
  }
  const int64_t whole = rows / size, bands = whole + (rows % size != 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < matrices * bands; ++item) {
    const int64_t base = item / bands * rows, band = item % bands;
    if (band < whole)
      rotate_band<In>(typed, out, kind, base + band * size, size, columns, signs);
    else
      walk(rows % size, size, [&](int64_t first, int n) {
        rotate_band<In>(typed, out, kind, base + whole * size + first, n, columns, signs);
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
  run(x, out, is_bf16 ? kNarrow : kWide, matrices, rows, columns, is_column, size, signs, threads);
}

}  // extern "C"
