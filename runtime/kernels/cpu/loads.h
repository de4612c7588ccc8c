// How the casts read: fp32, bf16 and fp16 as float, in the order of DTYPES of cast_library.py.
#pragma once

#include <cstdint>

#include "bits.h"

namespace {

struct Fp32 {
  using Storage = float;
  static inline float load(Storage v) { return v; }
};

struct Bf16 {
  using Storage = uint16_t;
  static inline float load(Storage v) { return float_of(uint32_t(v) << 16); }
};

struct Fp16 {
  using Storage = uint16_t;
  // The fraction and exponent moved into place are the value times 2^-112, subnormals too; 2^16 and above were Inf or NaN.
  static inline float load(Storage v) {
    const float magnitude = float_of(uint32_t(v & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
    return float_of(bits_of(magnitude) | special | uint32_t(v & 0x8000) << 16);
  }
};

}  // namespace
