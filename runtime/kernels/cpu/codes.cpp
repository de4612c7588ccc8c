// Decode: the fp32 values of codes; codes.h has the arithmetic. Plain C++17, called through ctypes by codes.py.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "codes.h"
#include "huge_pages.h"

extern "C" {

// bytes: of a code: 1 uint8, 4 int32, 8 int64. Returns 1 if a code is not one of the format.
int lp_decode(const CodePlan* plan, const void* codes, int bytes, float* out, int64_t count, int threads) {
  ask_for_huge_pages(out, count * 4);
  int is_beyond = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : is_beyond)
  for (int part = 0; part < threads; ++part) {
    const int64_t share = (count / threads + 64) & ~int64_t(63);
    const int64_t begin = std::min(count, part * share), size = std::min(count, begin + share) - begin;
    if (bytes == 1) is_beyond |= decode_run<uint8_t, int32_t>(*plan, static_cast<const uint8_t*>(codes) + begin, out + begin, size);
    if (bytes == 4) is_beyond |= decode_run<int32_t, int32_t>(*plan, static_cast<const int32_t*>(codes) + begin, out + begin, size);
    if (bytes == 8) is_beyond |= decode_run<int64_t, int64_t>(*plan, static_cast<const int64_t*>(codes) + begin, out + begin, size);
  }
  return is_beyond;
}

// The fp32 values of codes of blocks along the columns of a [rows, columns] matrix, times `unit` and the block's scale,
// divided by `divisor` if is_divided. Returns as lp_decode does.
int lp_decode_blocks(const CodePlan* plan, const uint8_t* codes, const float* scales, float* out, int64_t rows,
                     int64_t columns, int64_t block, float unit, float divisor, int is_divided, int threads) {
  ask_for_huge_pages(out, rows * columns * 4);
  constexpr int64_t kPart = 4096;  // elements that stay in the first-level cache
  const int64_t blocks = (columns + block - 1) / block, parts = (columns + kPart - 1) / kPart;
  int is_beyond = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : is_beyond)
  for (int64_t item = 0; item < rows * parts; ++item) {
    const int64_t row = item / parts, first = item % parts * kPart, size = std::min(kPart, columns - first);
    float* const values = out + row * columns + first;
    is_beyond |= decode_run<uint8_t, int32_t>(*plan, codes + row * columns + first, values, size);
    const float* const scale = scales + row * blocks + first / block;
    for (int64_t at = 0; at < size; at += block) {
      const float factor = scale[at / block];
      const int64_t end = std::min(size, at + block);
#pragma omp simd
      for (int64_t i = at; i < end; ++i) values[i] = values[i] * unit * factor;
    }
    if (is_divided) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) values[i] /= divisor;
    }
  }
  return is_beyond;
}

// The codes of `count` values on the grid, Inf of a format that has it among them. table, code_of: null but for a lookup
// format, of which they hold the finite values, increasing, and their codes.
void lp_codes(const CodePlan* plan, const float* table, const int32_t* code_of, int64_t values, const float* q, int64_t count,
              void* out, int bytes, int threads) {
  ask_for_huge_pages(out, count * bytes);
  const auto each = [&](auto* codes, int64_t begin, int64_t end) {
    using Code = std::remove_pointer_t<decltype(codes)>;
    if (table) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = std::lower_bound(table, table + values, q[i]) - table;
        const int64_t code = q[i] == 0 && (bits_of(q[i]) >> 31) ? plan->minus_zero : code_of[std::min(at, values - 1)];
        codes[i] = Code(q[i] != q[i] ? int64_t(plan->nan_code) : code);
      }
      return;
    }
    encode_run(*plan, q + begin, codes + begin, end - begin);
    if (plan->kind || plan->infinity == 0xffffffffu) return;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = bits_of(q[i]);
      if ((bits & 0x7fffffffu) == 0x7f800000u) codes[i] = Code(plan->infinity | (bits >> 31) << (plan->bits - 1));
    }
  };
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const int64_t share = (count / threads + 64) & ~int64_t(63);
    const int64_t begin = std::min(count, part * share), end = std::min(count, begin + share);
    if (bytes == 1) each(static_cast<uint8_t*>(out), begin, end);
    if (bytes == 4) each(static_cast<int32_t*>(out), begin, end);
    if (bytes == 8) each(static_cast<int64_t*>(out), begin, end);
  }
}
}
