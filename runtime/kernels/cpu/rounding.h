// Rounding: what a cast writes, and the scales of the blocks of a BlockPlan; cast.cpp explains the arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bits.h"
#include "cast_round.h"
#include "loads.h"

namespace {

// Mirrors BlockPlan: how the blocks of a block format are scaled; runtime/numerics/block_casts.py has the rules.
struct BlockPlan {
  int rule;          // LP_RULE_..., by the flags of runtime/kernels/constants.py
  int exponent;      // of the largest element, in units of the scale: floor(log2 max)
  double max;        // the largest element
  float round_from;  // even: the significand from which amax rounds up to the next power of two
  float unit;        // what an element of 1 stands for
  int bf16_from;     // smallest k at which every element times 2^k is a bf16
  int block;         // elements that share a scale: 16 or 32
  float per_max;     // two levels: fp32(1 / target)
  int height;        // rows that share a scale: 1 or 16
  float per_four;    // four_six: fp32(1 / 4)
  CastPlan element, scale;
};

// What a cast writes. Values are exact in each: a grid value is held in a dtype only if its whole format embeds there.
enum OutType { kFp32, kBf16, kFp16, kInt8 };
constexpr int kOutBytes[] = {4, 2, 2, 1};

void narrow(const float* __restrict from, void* to, int64_t at, int64_t count, int type) {
  if (type == kBf16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(to) + at;
    // A NaN gets the quiet bit: one whose payload lies in the low half alone would be cut to Inf.
    for (int64_t i = 0; i < count; ++i) {
      out[i] = uint16_t((bits_of(from[i]) | (from[i] != from[i] ? 0x400000u : 0u)) >> 16);
    }
  } else if (type == kFp16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t sign = bits_of(from[i]) >> 16 & 0x8000u, shifted = bits_of(from[i] * 0x1p-112f) & 0x7fffffffu;
      out[i] = uint16_t(sign | (from[i] != from[i] ? 0x7e00u : std::abs(from[i]) > 65504.0f ? 0x7c00u : shifted >> 13));
    }
  } else {
    int8_t* __restrict out = static_cast<int8_t*>(to) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = int8_t(int32_t(from[i]));
  }
}

// 2^k for -127 <= k <= 127; the lowest is subnormal.
inline float power_of_two(int k) { return float_of(k >= -126 ? uint32_t(k + 127) << 23 : 1u << 22); }

// k of an MX block from its largest magnitude; its scale is 2^k.
inline int shared_exponent(const BlockPlan& p, float amax) {
  if (!(amax > 0.0f)) return -127;
  const bool is_tiny = amax < 0x1p-126f;
  const uint32_t bits = bits_of(is_tiny ? amax * 0x1p24f : amax), fraction = bits & 0x7fffffu;
  int k = int(bits >> 23) - 127 - (is_tiny ? 24 : 0) - p.exponent;
  if (p.rule == LP_RULE_CEIL) k += fraction != 0;
  if (p.rule == LP_RULE_RCEIL) k += amax > p.max * std::ldexp(1.0, k);
  if (p.rule == LP_RULE_EVEN) k += float_of(fraction | 0x3f800000u) >= p.round_from;
  return std::clamp(k, -127, 127);
}

// The blocks of one run: q = round(x * factor), value = q * unit * scale.
template <int64_t N>
struct BlockScales {
  float amax[N], factor[N], scale[N];
};

// Scales from amax. A block with NaN or Inf gets NaN. Returns 1 if there is one, plus 2 if one is too fine for bf16.
template <int64_t N>
int scale_blocks(const BlockPlan& p, BlockScales<N>& s, int64_t count, float divisor, float per_max) {
  const float greatest = std::numeric_limits<float>::max(), nan = std::numeric_limits<float>::quiet_NaN();
  int said = 0;
  if (p.rule >= LP_RULE_TWO_LEVEL) {
    const CastPlan e4m3 = p.scale;
    const float up = divisor * per_max, down = 1.0f / divisor;
#pragma omp simd reduction(| : said)
    for (int64_t i = 0; i < count; ++i) {
      const bool is_bad = !(s.amax[i] <= greatest);
      const float scale = saturated(rounded<kFixed>(e4m3, s.amax[i] * up, 0), e4m3.min, e4m3.max);
      s.factor[i] = is_bad ? nan : std::min(1.0f / (scale * down), greatest);
      s.scale[i] = scale;
      said |= is_bad;
    }
    return said;
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool is_bad = !(s.amax[i] <= greatest);
    const int k = is_bad ? 0 : shared_exponent(p, s.amax[i]);
    s.factor[i] = is_bad ? nan : power_of_two(-k);
    s.scale[i] = power_of_two(k);
    said |= is_bad | (s.amax[i] > 0.0f && k < p.bf16_from) << 1;
  }
  return said;
}

template <class In>
inline float block_amax(const typename In::Storage* __restrict x, int64_t count) {
  uint32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < count; ++i) top = std::max(top, bits_of(In::load(x[i])) & 0x7fffffffu);
  return float_of(top);
}

// The same over `height` rows, for each of `width` columns.
template <class In>
inline void column_amax(const typename In::Storage* __restrict x, int64_t height, int64_t columns, int64_t width,
                        float* __restrict amax) {
  std::fill(amax, amax + width, 0.0f);
  for (int64_t row = 0; row < height; ++row) {
    const typename In::Storage* __restrict line = x + row * columns;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t magnitude = bits_of(In::load(line[j])) & 0x7fffffffu;
      amax[j] = float_of(std::max(bits_of(amax[j]), magnitude));
    }
  }
}

}  // namespace
