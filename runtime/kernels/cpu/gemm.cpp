// GEMM: C_MN = A_MK B_KN (+ bias_N) in fp32, for operands that embed exactly in bf16, by vdpbf16ps: two products a step,
// summed in fp32. Operands are fp32 or bf16 tensors whose values are bf16 values: the upper half of an fp32 is its bf16,
// exactly. Subnormal bf16 operands count as zero.
//
// Both operands are packed once: panels of 12 rows of A and 32 columns of B, in which the k that one step consumes lie
// together in 32 bits. A task computes a block of C, 96 x 512, over all of K in chunks that keep a panel of B in L1 and
// a block of B in L2. The order of additions depends on K alone, so the bits do not depend on threads or blocks.
//
// Plain C++17, no headers of torch; called through ctypes by runtime/kernels/cpu/gemm.py.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16_operand.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace {

constexpr int kRows = 12, kColumns = 32;      // of the register tile: 24 accumulators of 16 fp32
constexpr int64_t kSteps = 128;               // of one chunk of K
constexpr int64_t kRowBlock = 8 * kRows, kColumnBlock = 16 * kColumns;

inline uint32_t bits(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b >> 16;
}

inline uint32_t bits(uint16_t v) { return v; }

inline __m512i step(__m512i sum, __m512i a, __m512i b) {
  return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
}

// One panel of `width` outer indices (those from `valid` on are zero) and all k: out[step * width + i] holds the group
// of k at `step`. T is the element as stored; k_stride or outer is 1.
template <int width, typename T>
void pack_bf16(const T* data, int64_t outer, int64_t inner, int64_t valid, int64_t num_k, uint32_t* out) {
  const int64_t steps = (num_k + 1) / 2, whole = num_k / 2;
  if (inner == 1) {
    const int64_t vector_steps = whole / 16 * 16;
    for (int64_t first = 0; first < width; first += 16) {
      const int lanes = int(std::min<int64_t>(16, width - first));
      const __mmask16 mask = __mmask16((1u << lanes) - 1);
      for (int64_t s = 0; s < vector_steps; s += 16) {
        __m512i rows[16];
        for (int i = 0; i < 16; ++i)
          rows[i] = first + i < valid ? pairs(data + (first + i) * outer + 2 * s) : _mm512_setzero_si512();
        transpose16(rows);
        for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(out + (s + i) * width + first, mask, rows[i]);
      }
    }
    for (int64_t s = vector_steps; s < steps; ++s)
      for (int64_t i = 0; i < width; ++i) {
        uint32_t word = 0;
        if (i < valid) {
          word = bits(data[i * outer + 2 * s]);
          if (2 * s + 1 < num_k) word |= bits(data[i * outer + 2 * s + 1]) << 16;
        }
        out[s * width + i] = word;
      }
    return;
  }
  for (int64_t s = 0; s < steps; ++s) {
    const T* low = data + 2 * s * inner;
    const T* high = 2 * s + 1 < num_k ? low + inner : nullptr;
    uint32_t* row = out + s * width;
    for (int64_t i = 0; i < valid; ++i)
      row[i] = bits(low[i * outer]) | (high ? bits(high[i * outer]) << 16 : 0u);
    for (int64_t i = valid; i < width; ++i) row[i] = 0;
  }
}

template <int width>
void pack_panel(const Operand& x, int64_t first, int64_t count, int64_t num_k, uint32_t* out) {
  const int64_t valid = std::min<int64_t>(width, count - first), at = first * x.outer;
  if (x.dtype == 0)
    pack_bf16<width>(static_cast<const float*>(x.data) + at, x.outer, x.inner, valid, num_k, out);
  else
    pack_bf16<width>(static_cast<const uint16_t*>(x.data) + at, x.outer, x.inner, valid, num_k, out);
}

// tile += panel of A times panel of B over `steps` groups of k.
inline void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t steps, __m512i tile[kRows][2]) {
  for (int64_t s = 0; s < steps; ++s, a += kRows, b += kColumns) {
    const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512i broadcast = _mm512_set1_epi32(int(a[r]));
      tile[r][0] = step(tile[r][0], broadcast, left);
      tile[r][1] = step(tile[r][1], broadcast, right);
    }
  }
}

void gemm(const Operand& a, const Operand& b, const float* bias, float* c, int64_t num_m, int64_t num_n, int64_t num_k,
          int threads) {
  const int64_t steps = (num_k + 1) / 2;
  const int64_t row_panels = (num_m + kRows - 1) / kRows, column_panels = (num_n + kColumns - 1) / kColumns;
  static thread_local std::vector<uint32_t> scratch;
  scratch.resize(size_t(steps * (row_panels * kRows + column_panels * kColumns)) + 16);
  uint32_t* const packed_b = scratch.data();
  uint32_t* const packed_a = packed_b + steps * column_panels * kColumns;
  const int64_t row_blocks = (num_m + kRowBlock - 1) / kRowBlock;
  const int64_t column_blocks = (num_n + kColumnBlock - 1) / kColumnBlock;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < column_panels; ++p)
      pack_panel<kColumns>(b, p * kColumns, num_n, num_k, packed_b + p * steps * kColumns);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < row_panels; ++p)
      pack_panel<kRows>(a, p * kRows, num_m, num_k, packed_a + p * steps * kRows);

#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < row_blocks * column_blocks; ++task) {
      const int64_t first_row = task % row_blocks * (kRowBlock / kRows);
      const int64_t first_column = task / row_blocks * (kColumnBlock / kColumns);
      const int64_t last_row = std::min(first_row + kRowBlock / kRows, row_panels);
      const int64_t last_column = std::min(first_column + kColumnBlock / kColumns, column_panels);
      for (int64_t start = 0; start == 0 || start < steps; start += kSteps) {
        const int64_t count = std::min(kSteps, steps - start);
        for (int64_t j = first_column; j < last_column; ++j) {
          const int64_t columns = std::min<int64_t>(kColumns, num_n - j * kColumns);
          const __mmask16 left = __mmask16((1u << std::min<int64_t>(16, columns)) - 1);
          const __mmask16 right = columns > 16 ? __mmask16((1u << (columns - 16)) - 1) : __mmask16(0);
          const uint32_t* panel_b = packed_b + (j * steps + start) * kColumns;
          for (int64_t i = first_row; i < last_row; ++i) {
            const int64_t rows = std::min<int64_t>(kRows, num_m - i * kRows);
            float* const corner = c + i * kRows * num_n + j * kColumns;
            __m512i tile[kRows][2];
            __m512i head[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (start == 0 && bias) {
              head[0] = _mm512_maskz_loadu_epi32(left, bias + j * kColumns);
              head[1] = _mm512_maskz_loadu_epi32(right, bias + j * kColumns + 16);
            }
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
              const bool is_read = start > 0 && r < rows;
              tile[r][0] = is_read ? _mm512_maskz_loadu_epi32(left, corner + r * num_n) : head[0];
              tile[r][1] = is_read ? _mm512_maskz_loadu_epi32(right, corner + r * num_n + 16) : head[1];
            }
            multiply_panels(packed_a + (i * steps + start) * kRows, panel_b, count, tile);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
              if (r >= rows) continue;
              _mm512_mask_storeu_epi32(corner + r * num_n, left, tile[r][0]);
              _mm512_mask_storeu_epi32(corner + r * num_n + 16, right, tile[r][1]);
            }
          }
        }
      }
    }
  }
}

}  // namespace

extern "C" {

int lp_gemm_is_supported() { return 1; }

// c: [m, n], row-major. a: element (m, k) at outer m + inner k; b: element (k, n) at outer n + inner k. bias: null or n fp32.
// dtype: 0 fp32, 1 bf16.
void lp_gemm(const void* a, int a_dtype, int64_t a_outer, int64_t a_inner, const void* b, int b_dtype, int64_t b_outer,
             int64_t b_inner, const float* bias, float* c, int64_t m, int64_t n, int64_t k, int threads) {
  const Operand left{a, a_dtype, a_outer, a_inner}, right{b, b_dtype, b_outer, b_inner};
  gemm(left, right, bias, c, m, n, k, threads);
}

}  // extern "C"

#else

extern "C" {

int lp_gemm_is_supported() { return 0; }

void lp_gemm(const void*, int, int64_t, int64_t, const void*, int, int64_t, int64_t, const float*, float*, int64_t,
             int64_t, int64_t, int) {}

}  // extern "C"

#endif
