// Cast, one value: how cast.cpp and update.cpp round an fp32 to a scalar format; the equations are explained in cast.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bits.h"

namespace {

// Mirrors CastPlan in runtime/kernels/cpu/cast_library.py, field by field; runtime/kernels/cast_plans.py fills it in.
struct CastPlan {
  uint32_t shift;       // bits of an fp32 fraction that the format does not keep
  uint32_t round_bias;  // added to bits(a)
  uint32_t odd_mask;    // 1: also add the last kept bit
  uint32_t keep_mask;   // ~(2^shift - 1)
  float low;            // where the constant spacing ends
  float magic;          // 2^23 spacing
  float spacing;        // of the low half
  float up_at;          // step up if d >= up_at
  float down_below;     // step down if d < down_below
  float max;            // saturation
  float zero;           // added last: -0.0f keeps the sign of zero, +0.0f (integers) clears it
  float min;            // saturation below
};

// How a value is rounded: kFixed as the plan says; by chance in the bits of fp32 alone, where the format loses precision
// where fp32 does (bf16); in fp32, where the spacing of the low half is a power of two that has an inverse; by chance in
// double, in every other format.
enum Chance { kFixed, kBits, kSingle, kDouble };

inline Chance chance_of(const CastPlan& p, bool is_stochastic) {
  if (!is_stochastic) return kFixed;
  if (p.low == 0x1p-126f && bits_of(p.spacing) == 1u << p.shift) return kBits;
  const bool is_power = (bits_of(p.spacing) & 0x7fffffu) == 0;
  return is_power && p.spacing >= 0x1p-126f ? kSingle : kDouble;
}

// y rounded by `p`, not saturated; NaN for NaN. word: 32 random bits, unless kFixed. In the low half of kSingle t = a /
// spacing and what is behind its point are exact, and up is rest >= 1 - word 2^-32, that is, floor(rest 2^32) + word
// reaches 2^32.
template <Chance C>
inline float rounded(const CastPlan& p, float y, uint32_t word) {
  const uint32_t bits = bits_of(y), magnitude = bits & 0x7fffffffu;
  const float a = float_of(magnitude);
  float upper, lower;
  if (C == kFixed) {
    upper = float_of((magnitude + p.round_bias + ((magnitude >> p.shift) & p.odd_mask)) & p.keep_mask);
    const float nearest = (a + p.magic) - p.magic, d = a - nearest;
    lower = nearest + (d >= p.up_at ? p.spacing : 0.0f) - (d < p.down_below ? p.spacing : 0.0f);
  } else {
    upper = float_of((magnitude + (word >> 1 >> (31 - p.shift))) & p.keep_mask);
    if (C == kBits) {
      lower = upper;
    } else if (C == kSingle) {
      const float t = (a < p.low ? a : p.low) * (1.0f / p.spacing), below = std::floor(t);
      const uint32_t rest = uint32_t((t - below) * 0x1p32f);
      lower = (below + (rest + word < word ? 1.0f : 0.0f)) * p.spacing;
    } else {
      const double spacing = p.spacing, t = std::min(a, p.low) / spacing, below = std::floor(t);
      lower = float((below + (t - below >= 1.0 - word * 0x1p-32 ? 1.0 : 0.0)) * spacing);
    }
  }
  const float q = a < p.low ? lower : upper;
  return y != y ? y : float_of(bits_of(q) | (bits & 0x80000000u));
}

// q within [min, max], NaN as it is.
inline float saturated(float q, float min, float max) { return q > max ? max : q < min ? min : q; }

}  // namespace
