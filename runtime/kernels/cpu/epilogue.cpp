// Epilogue: what follows a product, in one pass over it and in place: y = relu?(y * s * t + b + r), each operation rounded
// once, in this order, so that the bits are those of one torch operation after another.
//
// Scales and bias are read as value[m * rows + n * columns] with strides of 0 or 1; an absent scale is 1 and an absent
// bias is -0, which change no bit of a number. relu keeps NaN and -0, as torch's does.
//
// Plain C++17, no headers of torch; called through ctypes by runtime/kernels/cpu/epilogue.py.

#include <cstdint>

namespace {

struct Vector {
  const float* data;
  int64_t rows, columns;
};

// One row. `wide` operands vary along the row; the others are one number in it.
template <bool t_wide, bool b_wide, bool has_residual, bool has_relu>
void finish_row(float* y, float s, const float* t, const float* b, const float* r, int64_t n) {
  const float t0 = *t, b0 = *b;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float v = y[j] * s;
    v = v * (t_wide ? t[j] : t0);
    v = v + (b_wide ? b[j] : b0);
    if (has_residual) v = v + r[j];
    if (has_relu) v = v < 0 ? 0.0f : v;
    y[j] = v;
  }
}

using Row = void (*)(float*, float, const float*, const float*, const float*, int64_t);

template <int bits>
Row pick(int wanted) {
  if constexpr (bits == 16) {
    return nullptr;
  } else {
    return wanted == bits ? finish_row<(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0>
                          : pick<bits + 1>(wanted);
  }
}

}  // namespace

extern "C" {

// y: [m, n] row-major, in place. s varies along m or not at all; t and b along m, n or neither. residual: null or [m, n].
void lp_epilogue(float* y, int64_t m, int64_t n, const float* s, int64_t s_rows, const float* t, int64_t t_rows,
                 int64_t t_columns, const float* b, int64_t b_rows, int64_t b_columns, const float* residual, int relu,
                 int threads) {
  const Row row = pick<0>(int(t_columns != 0) | int(b_columns != 0) << 1 | int(residual != nullptr) << 2 | relu << 3);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < m; ++i)
    row(y + i * n, s[i * s_rows], t + i * t_rows, b + i * b_rows, residual ? residual + i * n : nullptr, n);
}

}  // extern "C"
