// Moments in blocks, of runtime/optim/block_states.py: codes and a scale a block, to fp32 and back, for update.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bits.h"

namespace {

// Mirrors Blocks in update.py.
struct Blocks {
  float* scales;
  int64_t size;           // of a block; update.cpp's own are multiples of it
  float max;              // of a float format; of a table 1
  int32_t bits;           // of a code
  const float* values;    // of a table, by code; null of a float format
  const float* middles;   // between neighbours, Inf behind the last
  const int32_t* bases;   // how many middles lie below all numbers of one sign, exponent and seven fraction bits
  int32_t first, last;    // the numbers of those three, without the sign, of the first and last entry
};

// Times the scale of its block, element by element.
inline void scale_back(const Blocks& b, int64_t begin, int64_t count, float* x) {
  for (int64_t at = 0; at < count; at += b.size) {
    const float scale = b.scales[(begin + at) / b.size];
    const int64_t end = std::min(count, at + b.size);
    for (int64_t i = at; i < end; ++i) x[i] *= scale;
  }
}

// Over the scale of its block, which is found from it and kept; a table's is NaN where a value is not finite.
inline void scale_down(const Blocks& b, int64_t begin, int64_t count, float* x) {
  for (int64_t at = 0; at < count; at += b.size) {
    const int64_t end = std::min(count, at + b.size);
    uint32_t top = 0, bad = 0;  // integers have the order of magnitudes
#pragma omp simd reduction(max : top) reduction(| : bad)
    for (int64_t i = at; i < end; ++i) {
      const uint32_t size = bits_of(x[i]) & 0x7fffffffu, is_bad = size >= 0x7f800000u ? ~0u : 0u;
      top = std::max(top, size & ~is_bad);
      bad |= is_bad;
    }
    const float found = b.values ? float_of(top) : float_of(top) / b.max, scale = found > 0.0f ? found : 1.0f;
    for (int64_t i = at; i < end; ++i) x[i] /= scale;
    b.scales[(begin + at) / b.size] = b.values && bad ? std::numeric_limits<float>::quiet_NaN() : scale;
  }
}

// The number of middles below each value: those below all of its bucket, which has at most one within it.
inline void look_up(const Blocks& b, const float* __restrict y, int64_t count, int32_t* __restrict codes) {
  const float* const middles = b.middles;
  const int32_t* const bases = b.bases;
  const int32_t first = b.first, last = b.last, entries = last - first + 1, top = (1 << b.bits) - 1;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(y[i]);
    const int32_t key = int32_t((bits & 0x7fffffffu) >> 16), inside = std::min(std::max(key, first), last) - first;
    const int32_t base = bases[inside + int32_t(bits >> 31) * entries];
    const int32_t code = base + (middles[base] < y[i] ? 1 : 0);
    codes[i] = y[i] != y[i] ? top : code;
  }
}

// A table's codes out of and into their bytes, two in each of 4 bits; begin is even.
inline void load_table(const Blocks& b, const uint8_t* at, int64_t begin, int64_t count, float* __restrict out) {
  const float* const values = b.values;
  if (b.bits == 8) {
    for (int64_t i = 0; i < count; ++i) out[i] = values[at[begin + i]];
  } else {
    const uint8_t* const pairs = at + begin / 2;
    for (int64_t i = 0; i < count / 2; ++i) out[2 * i] = values[pairs[i] & 15], out[2 * i + 1] = values[pairs[i] >> 4];
    if (count % 2) out[count - 1] = values[pairs[count / 2] & 15];
  }
}

inline void store_table(const Blocks& b, uint8_t* at, int64_t begin, int64_t count, const int32_t* codes) {
  if (b.bits == 8) {
    uint8_t* __restrict out = at + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = uint8_t(codes[i]);
  } else {
    uint8_t* __restrict pairs = at + begin / 2;
    for (int64_t i = 0; i < count / 2; ++i) pairs[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
    if (count % 2) pairs[count / 2] = uint8_t(codes[count - 1]);
  }
}

}  // namespace
