// Small: the steps of one small product, scale, cast, multiply, epilogue, without leaving C++ between them. It computes
// nothing itself: every step is a function of the kernels that a large product calls one by one, by its address, on one
// thread, so the bits are theirs.
//
// Plain C++17, no headers of torch; called through ctypes by runtime/kernels/cpu/small.py.

#include <cstdint>
#include <vector>

namespace {

using CastCall = int (*)(const void*, const void*, int, void*, int, int64_t, int64_t, const float*, int64_t, int64_t, int,
                         const void*, int);
using ScaleCall = void (*)(const void*, int, float*, int64_t, int64_t, int64_t, int64_t, double, int, int);
using Bf16Call = void (*)(const void*, int, int64_t, int64_t, const void*, int, int64_t, int64_t, const float*, float*,
                          int64_t, int64_t, int64_t, int);
using Int8Call = void (*)(const void*, int64_t, int64_t, const void*, int64_t, int64_t, float*, int64_t, int64_t, int64_t, int);
using EpilogueCall = void (*)(float*, int64_t, int64_t, const float*, int64_t, const float*, int64_t, int64_t, const float*,
                              int64_t, int64_t, const float*, int, int);

constexpr int kFp32 = 0, kBf16 = 1, kInt8 = 3;  // as cast.cpp numbers them
enum Scales { kNone, kOne, kOneARow, kOneAColumn };  // of a matrix
constexpr float kUnit = 1.0f, kMinusZero = -0.0f;

// The product sums along the columns of the matrix, or along its rows.
struct Operand {
  const void* plan;
  CastCall cast;
  ScaleCall scale;
  double max;
  int is_pow2;
  Scales scales;
  int is_summed_along_rows;
};

struct Product {
  Operand left, right;
  int type;
  Bf16Call bf16;
  Int8Call int8;
  EpilogueCall epilogue;
};

// Returns whether a value overflowed or was NaN.
bool cast_into(const Operand& how, int type, const float* x, int64_t rows, int64_t columns, void* grid, float* scales) {
  if (how.scales == kNone)  // nothing varies: one long row
    return how.cast(how.plan, x, kFp32, grid, type, 1, rows * columns, nullptr, 1, rows * columns, 0, nullptr, 1);
  const int64_t tile_rows = how.scales == kOneARow ? 1 : rows, tile_columns = how.scales == kOneAColumn ? 1 : columns;
  how.scale(x, kFp32, scales, rows, columns, tile_rows, tile_columns, how.max, how.is_pow2, 1);
  return how.cast(how.plan, x, kFp32, grid, type, rows, columns, scales, tile_rows, tile_columns, 0, nullptr, 1);
}

// A cast matrix: grid values of 1 or 2 bytes, its scales, its strides as gemm.cpp reads it.
struct Cast {
  std::vector<uint16_t> grid;
  std::vector<float> scales;
  int64_t outer, inner, kept, summed;
  bool said;
};

Cast cast(const Operand& how, int type, const float* x, int64_t rows, int64_t columns) {
  const int64_t count[] = {0, 1, rows, columns};
  Cast made{std::vector<uint16_t>(rows * columns), std::vector<float>(count[how.scales]), columns, 1, rows, columns, false};
  if (how.is_summed_along_rows) made.outer = 1, made.inner = columns, made.kept = columns, made.summed = rows;
  made.said = cast_into(how, type, x, rows, columns, made.grid.data(), made.scales.data());
  return made;
}

}  // namespace

// out = left right + bias of two contiguous fp32 matrices, cast as `how` says; bias: null or one a column. Returns 1 if a
// value of left overflowed or was NaN, plus 2 if one of right was; of int8 out is then not written.
extern "C" int lp_small(const Product* how, const float* left, int64_t left_rows, int64_t left_columns, const float* right,
                        int64_t right_rows, int64_t right_columns, const float* bias, float* out) {
  const Cast a = cast(how->left, how->type, left, left_rows, left_columns);
  const Cast b = cast(how->right, how->type, right, right_rows, right_columns);
  const int said = int(a.said) | int(b.said) << 1;
  const int64_t m = a.kept, n = b.kept, k = a.summed;
  const bool is_scaled = !a.scales.empty() || !b.scales.empty();
  if (how->type == kInt8) {
    if (said) return said;
    how->int8(a.grid.data(), a.outer, a.inner, b.grid.data(), b.outer, b.inner, out, m, n, k, 1);
  } else {
    const float* inside = is_scaled ? nullptr : bias;
    how->bf16(a.grid.data(), kBf16, a.outer, a.inner, b.grid.data(), kBf16, b.outer, b.inner, inside, out, m, n, k, 1);
    if (!is_scaled) return said;
  }
  if (!is_scaled && !bias) return said;
  const float* s = a.scales.empty() ? &kUnit : a.scales.data();
  const float* t = b.scales.empty() ? &kUnit : b.scales.data();
  how->epilogue(out, m, n, s, a.scales.size() > 1, t, 0, b.scales.size() > 1, bias ? bias : &kMinusZero, 0, bias && n > 1,
                nullptr, 0, 1);
  return said;
}

// The cast of one contiguous fp32 matrix to grid values in fp32, and its scales. Returns 1 if a value overflowed or was NaN.
extern "C" int lp_small_cast(const Operand* how, const float* x, int64_t rows, int64_t columns, float* grid, float* scales) {
  return cast_into(*how, kFp32, x, rows, columns, grid, scales);
}
