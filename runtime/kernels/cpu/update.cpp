// Update: one step of AdamW or of momentum SGD in one pass over a parameter, its gradient and its states.
//
// Blocks that stay in the first-level cache are read into fp32, updated, rounded and written back. The arithmetic is that
// of runtime/optim/adamw.py and sgd.py, operation by operation, fused multiply-adds where torch has them; rounding and
// codes are the functions that a large cast calls, by their addresses, so the bits are theirs.
//
// Plain C++17, no headers of torch; called through ctypes by update.py. Needs -ffp-contract=off and no -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bits.h"
#include "philox.h"

namespace {

using CastCall = int (*)(const void*, const void*, int, void*, int, int64_t, int64_t, const float*, int64_t, int64_t, int,
                         const RandomPlan*, int);
using EncodeCall = int (*)(const void*, const void*, const void*, const void*, int, void*, int, int64_t, int64_t, const float*,
                           int64_t, int64_t, const RandomPlan*, int);
using DecodeCall = int (*)(const void*, const void*, int, float*, int64_t, int);
using RoundCall = void (*)(const void*, const void*, void*, int, int64_t, const RandomPlan*, int);

enum Kind { kFp32, kBf16, kFp16, kCodes8, kCodes16, kSplit, kNothing };
constexpr int64_t kBlock = 2048;

// Mirrors Kept in update.py: where values of one format lie, and how they are rounded.
struct Kept {
  int32_t kind;
  int32_t is_rounded, is_stochastic;
  void* at;
  int16_t* low;       // kSplit: the remainder
  const void* cast;   // CastPlan: the rounding, of fp32
  const void* grid;   // GridPlan: the same, of double
  const void* exact;  // CastPlan: one to nearest, of values that are on the grid
  const void* codes;  // CodePlan
  RandomPlan random;
};

// Mirrors Calls.
struct Calls {
  CastCall cast;
  EncodeCall encode;
  DecodeCall decode;
  RoundCall round;
};

// Mirrors Numbers; each as fp32, as torch takes them.
struct Numbers {
  float unscale, decay, beta, rest;  // of SGD: lambda, m, -lr, in this order after the first
  float beta2, rest2, root, eps, size;
};

inline float of_bf16(uint16_t v) { return float_of(uint32_t(v) << 16); }

void load(const Calls& calls, const Kept& k, int64_t begin, int64_t count, float* out) {
  if (k.kind == kFp32) {
    std::copy_n(static_cast<const float*>(k.at) + begin, count, out);
  } else if (k.kind == kBf16) {
    const uint16_t* x = static_cast<const uint16_t*>(k.at) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = of_bf16(x[i]);
  } else if (k.kind == kSplit) {
    const uint16_t* x = static_cast<const uint16_t*>(k.at) + begin;
    const int16_t* low = k.low + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = float_of((uint32_t(x[i]) << 16) + uint32_t(int32_t(low[i])));
  } else if (k.kind == kCodes8) {
    calls.decode(k.codes, static_cast<const uint8_t*>(k.at) + begin, 1, out, count, 1);
  } else if (k.kind == kCodes16) {
    int32_t wide[kBlock];
    const uint16_t* x = static_cast<const uint16_t*>(k.at) + begin;
    for (int64_t i = 0; i < count; ++i) wide[i] = x[i];
    calls.decode(k.codes, wide, 4, out, count, 1);
  } else {
    std::fill_n(out, count, 0.0f);
  }
}

// fp32 values into their place: those that are on the grid already, or, with `random` or a plan of their own, rounded.
void store(const Calls& calls, const Kept& k, const void* plan, const RandomPlan* random, int64_t begin, int64_t count, float* q) {
  if (k.kind == kFp32 || k.kind == kBf16) {
    const int bytes = k.kind == kFp32 ? 4 : 2;
    void* out = static_cast<char*>(k.at) + begin * bytes;
    if (plan) calls.cast(plan, q, kFp32, out, k.kind, 1, count, nullptr, 1, count, 0, random, 1);
  } else if (k.kind == kSplit) {
    uint16_t* out = static_cast<uint16_t*>(k.at) + begin;
    int16_t* low = k.low + begin;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t given = bits_of(q[i]), bits = q[i] != q[i] ? (given & 0x80000000u) | 0x7fc00000u : given;
      low[i] = int16_t(bits & 0xffffu);
      out[i] = uint16_t((bits - uint32_t(int32_t(low[i]))) >> 16);
    }
  } else if (k.kind == kCodes8) {
    calls.encode(plan, nullptr, k.codes, q, kFp32, static_cast<uint8_t*>(k.at) + begin, 1, 1, count, nullptr, 1, count, random, 1);
  } else if (k.kind == kCodes16) {
    int32_t wide[kBlock];
    calls.encode(plan, nullptr, k.codes, q, kFp32, wide, 4, 1, count, nullptr, 1, count, random, 1);
    uint16_t* out = static_cast<uint16_t*>(k.at) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = uint16_t(wide[i]);
  }
}

RandomPlan at(const Kept& k, int64_t begin) {
  RandomPlan random = k.random;
  random.offset += begin;
  return random;
}

void round_and_store(const Calls& calls, const Kept& k, int64_t begin, int64_t count, float* q) {
  const RandomPlan random = at(k, begin);
  store(calls, k, k.is_rounded ? k.cast : nullptr, k.is_stochastic ? &random : nullptr, begin, count, q);
}

// double values, rounded to odd, as they will be kept, in fp32.
void rounded(const Calls& calls, const Kept& k, int64_t begin, int64_t count, double* x, float* q) {
  if (k.is_rounded) {
    const RandomPlan random = at(k, begin);
    calls.round(k.grid, x, x, 1, count, k.is_stochastic ? &random : nullptr, 1);
  }
  for (int64_t i = 0; i < count; ++i) q[i] = float(x[i]);
}

// p + q rounded to odd: where the sum in double is not exact and even, its neighbour on the side of what was lost.
inline double odd_sum(double p, double q) {
  const double total = p + q, back = total - p, lost = (p - (total - back)) + (q - back);
  const uint64_t bits = bits_of(total);
  // lost and total of one sign: away from zero by 1 where the last bit is 0; of two: toward zero. Without a branch: of a
  // sum that is not finite lost is NaN, and of an exact one 0.
  const uint64_t is_even = (bits & 1) ^ 1, is_opposite = (bits_of(lost) ^ bits) >> 63;
  const double size = std::fabs(lost);
  const uint64_t moved = bits + is_even - 2 * (is_even & is_opposite);
  const double finite = size > 0.0 ? double_of(moved) : total;
  return size <= std::numeric_limits<double>::max() ? finite : total;
}

// Where the values are read and updated: their own memory, if they lie there in fp32, else `buffer`.
inline float* view(const Calls& calls, const Kept& k, int64_t begin, int64_t count, float* buffer) {
  if (k.kind == kFp32) return static_cast<float*>(k.at) + begin;
  load(calls, k, begin, count, buffer);
  return buffer;
}

template <class Body>
void for_blocks(int64_t count, int threads, const Body& body) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlock;
    body(begin, std::min(kBlock, count - begin));
  }
}

}  // namespace

extern "C" {

void lp_adamw(const Calls* calls, const Numbers* numbers, const Kept* weight, const Kept* moment, const Kept* variance,
              const Kept* gradient, int64_t count, int threads) {
  const Numbers c = *numbers;
  const bool is_near = std::fabs(c.rest) < 0.5f;
  const float coefficient = is_near ? c.rest : c.rest - 1.0f;
  for_blocks(count, threads, [&](int64_t begin, int64_t size) {
    alignas(64) float buffer[4][kBlock];
    float* const w = view(*calls, *weight, begin, size, buffer[0]);
    float* const m = view(*calls, *moment, begin, size, buffer[1]);
    float* const v = view(*calls, *variance, begin, size, buffer[2]);
    const float* const g = view(*calls, *gradient, begin, size, buffer[3]);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float x = g[i] * c.unscale;
      m[i] = std::fma(coefficient, x - m[i], is_near ? m[i] : x);
      v[i] = std::fma(c.rest2 * x, x, v[i] * c.beta2);
      const float denominator = std::sqrt(v[i]) / c.root + c.eps;
      w[i] = w[i] * c.decay + (c.size * m[i]) / denominator;
    }
    round_and_store(*calls, *moment, begin, size, m);
    round_and_store(*calls, *variance, begin, size, v);
    round_and_store(*calls, *weight, begin, size, w);
  });
}

// gradient_rounding: how AXPY (1) is rounded; nothing is kept there.
void lp_sgd(const Calls* calls, const Numbers* numbers, const Kept* weight, const Kept* moment, const Kept* gradient,
            const Kept* gradient_rounding, int64_t count, int threads) {
  const double unscale = numbers->unscale, lambda = numbers->decay, m = numbers->beta, eta = numbers->rest;
  for_blocks(count, threads, [&](int64_t begin, int64_t size) {
    alignas(64) float buffer[4][kBlock];
    alignas(64) double x[kBlock];
    float* const w = view(*calls, *weight, begin, size, buffer[0]);
    float* const old = view(*calls, *moment, begin, size, buffer[1]);
    const float* const given = view(*calls, *gradient, begin, size, buffer[2]);
    float* const g = buffer[3];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) x[i] = odd_sum(given[i] * unscale, w[i] * lambda);
    rounded(*calls, *gradient_rounding, begin, size, x, g);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) x[i] = odd_sum(old[i] * m, g[i] * eta);
    rounded(*calls, *moment, begin, size, x, old);
    if (weight->is_rounded) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) x[i] = odd_sum(w[i], old[i]);
      rounded(*calls, *weight, begin, size, x, w);
    } else {  // fp32's own sum is rounded once
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) w[i] += old[i];
    }
    store(*calls, *moment, moment->kind == kFp32 ? nullptr : moment->exact, nullptr, begin, size, old);
    store(*calls, *weight, weight->kind == kFp32 ? nullptr : weight->exact, nullptr, begin, size, w);
  });
}
}
