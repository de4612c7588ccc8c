// Update: one step of AdamW or of momentum SGD in one pass over a parameter, its gradient and its states.
//
// Blocks that stay in the first-level cache are read into fp32, updated, rounded and written back. The arithmetic is that
// of runtime/optim/adamw.py and sgd.py, operation by operation, fused multiply-adds where torch has them; rounding and
// codes are the functions of a large cast (cast_round.h, codes.h), and of sums in double those of odd_sum.h.
//
// Plain C++17, no headers of torch; called through ctypes by update.py. Needs -ffp-contract=off and no -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bits.h"
#include "cast_round.h"
#include "codes.h"
#include "odd_sum.h"
#include "philox.h"
#include "update_blocks.h"

namespace {

using RoundCall = void (*)(const void*, const void*, void*, int, int64_t, const RandomPlan*, int);

enum Kind { kFp32, kBf16, kCodes8, kCodes16, kSplit, kNothing, kTable };
constexpr int64_t kBlock = 1024;
constexpr int64_t kWords = kBlock + 136;  // words before and behind those of a block included

// Mirrors Kept in update.py: where values of one format lie, and how they are rounded.
struct Kept {
  int32_t kind;
  int32_t is_rounded, is_stochastic;
  int32_t mode;  // Mode of odd_sum.h, of the rounding of doubles; -1: `round` knows how
  void* at;
  int16_t* low;          // kSplit: the remainder
  const CastPlan* cast;  // the rounding, of fp32
  const GridPlan* grid;  // the same, of double
  const CodePlan* codes;
  RoundCall round;       // lp_round of grid.cpp
  const Blocks* blocks;  // null: one scale, 1
  RandomPlan random;
};

// Mirrors Numbers; each as fp32, as torch takes them.
struct Numbers {
  float unscale, decay, beta, rest;  // of SGD: lambda, m, -lr, in this order after the first
  float beta2, rest2, root, eps, size;
};

inline float of_bf16(uint16_t v) { return float_of(uint32_t(v) << 16); }

void load(const Kept& k, int64_t begin, int64_t count, float* __restrict out) {
  if (k.kind == kFp32) {
    std::copy_n(static_cast<const float*>(k.at) + begin, count, out);
  } else if (k.kind == kBf16) {
    const uint16_t* x = static_cast<const uint16_t*>(k.at) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = of_bf16(x[i]);
  } else if (k.kind == kSplit) {
    const uint16_t* x = static_cast<const uint16_t*>(k.at) + begin;
    const int16_t* low = k.low + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = float_of((uint32_t(x[i]) << 16) + uint32_t(int32_t(low[i])));
  } else if (k.kind == kTable) {
    load_table(*k.blocks, static_cast<const uint8_t*>(k.at), begin, count, out);
  } else if (k.kind == kCodes8) {
    decode_run<uint8_t, int32_t>(*k.codes, static_cast<const uint8_t*>(k.at) + begin, out, count);
  } else if (k.kind == kCodes16) {
    decode_run<uint16_t, int32_t>(*k.codes, static_cast<const uint16_t*>(k.at) + begin, out, count);
  } else {
    std::fill_n(out, count, 0.0f);
  }
  if (k.blocks) scale_back(*k.blocks, begin, count, out);
}

// fp32 values that are on the grid into their place, where they are not there already.
void store(const Kept& k, int64_t begin, int64_t count, const float* __restrict q) {
  if (k.kind == kBf16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(k.at) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = uint16_t((bits_of(q[i]) | (q[i] != q[i] ? 0x400000u : 0u)) >> 16);
  } else if (k.kind == kSplit) {
    uint16_t* __restrict out = static_cast<uint16_t*>(k.at) + begin;
    int16_t* __restrict low = k.low + begin;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t given = bits_of(q[i]), bits = q[i] != q[i] ? (given & 0x80000000u) | 0x7fc00000u : given;
      low[i] = int16_t(bits & 0xffffu);
      out[i] = uint16_t((bits - uint32_t(int32_t(low[i]))) >> 16);
    }
  } else if (k.kind == kCodes8) {
    encode_run(*k.codes, q, static_cast<uint8_t*>(k.at) + begin, count);
  } else if (k.kind == kCodes16) {
    encode_run(*k.codes, q, static_cast<uint16_t*>(k.at) + begin, count);
  }
}

// The random words of a block: those of its elements, in `buffer`.
const uint32_t* words_of(const Kept& k, int64_t begin, int64_t count, uint32_t* buffer) {
  const int64_t element = k.random.offset + begin, first = element / 4;
  philox(k.random, first, (element + count + 3) / 4 - first, buffer);
  return buffer + element % 4;
}

template <Chance C>
void round_block(const CastPlan& plan, float* q, int64_t count, const uint32_t* __restrict words) {
  const CastPlan p = plan;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    q[i] = saturated(rounded<C>(p, q[i], C == kFixed ? 0 : words[i]), p.min, p.max) + p.zero;
  }
}

// By chance, for values of which none needs more than an addition to its bits: all lie between where the spacing becomes
// constant and the largest value, or are 0. False, and nothing written, if one does not.
bool round_plain(const CastPlan& p, bool is_linear, float* q, int64_t count, const uint32_t* __restrict words) {
  const float low = is_linear ? 0.0f : p.low, max = std::min(p.max, -p.min), zero = p.zero;
  uint32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < count; ++i) {
    const float a = std::fabs(q[i]);
    found |= (uint32_t(a < low) & uint32_t(a != 0.0f)) | uint32_t(!(a <= max));
  }
  if (found) return false;
  const uint32_t shift = 31 - p.shift, keep = p.keep_mask;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) q[i] = float_of((bits_of(q[i]) + (words[i] >> 1 >> shift)) & keep) + zero;
  return true;
}

// fp32 values as they will be kept.
void round_values(const Kept& k, int64_t begin, int64_t count, float* q, uint32_t* buffer) {
  if (!k.is_rounded) return;
  const CastPlan& plan = *k.cast;
  if (!k.is_stochastic) return round_block<kFixed>(plan, q, count, nullptr);
  const uint32_t* words = words_of(k, begin, count, buffer);
  const Chance chance = chance_of(plan, true);
  if (round_plain(plan, chance == kBits, q, count, words)) return;
  if (chance == kBits) round_block<kBits>(plan, q, count, words);
  else if (chance == kSingle) round_block<kSingle>(plan, q, count, words);
  else round_block<kDouble>(plan, q, count, words);
}

void round_and_store(const Kept& k, int64_t begin, int64_t count, float* q, uint32_t* buffer) {
  if (k.blocks) scale_down(*k.blocks, begin, count, q);
  if (k.kind == kTable) {
    int32_t codes[kBlock];
    look_up(*k.blocks, q, count, codes);
    return store_table(*k.blocks, static_cast<uint8_t*>(k.at), begin, count, codes);
  }
  round_values(k, begin, count, q, buffer);
  store(k, begin, count, q);
}

// out = a x + b y as it will be kept by `k`, in fp32; out may be x or y.
void combine(const Kept& k, double a, const float* x, double b, const float* y, int64_t begin, int64_t count, float* out,
             uint32_t* buffer) {
  if (!k.is_rounded) return odd_run(a, x, b, y, count, out);
  alignas(64) double sum[kBlock];
  odd_run(a, x, b, y, count, sum);
  bool is_open = k.mode < 0;
  const uint32_t* words = k.mode == kStochastic ? words_of(k, begin, count, buffer) : nullptr;
  if (k.mode == kEven) is_open = round_odd<kEven>(*k.grid, sum, words, count, out);
  if (k.mode == kAway) is_open = round_odd<kAway>(*k.grid, sum, words, count, out);
  if (k.mode == kZero) is_open = round_odd<kZero>(*k.grid, sum, words, count, out);
  if (k.mode == kStochastic && !round_plain(*k.grid, sum, words, count, out) && round_odd<kStochastic>(*k.grid, sum, words, count, out)) {
    round_in_gap(*k.grid, sum, words, count, out);
  }
  if (is_open) {
    RandomPlan random = k.random;
    random.offset += begin;
    k.round(k.grid, sum, sum, 1, count, k.is_stochastic ? &random : nullptr, 1);
    for (int64_t i = 0; i < count; ++i) out[i] = float(sum[i]);
  }
}

// Asks for the values of the block behind this one: what the unit fetches by itself stops where a block is computed on.
inline void fetch_next(const Kept& k, int64_t begin, int64_t count) {
  constexpr int kBytes[] = {4, 2, 1, 2, 2, 0, 0};
  const int64_t bytes = count * kBytes[k.kind];
  if (bytes == 0) return;
  const char* const next = static_cast<const char*>(k.at) + (begin + count) * kBytes[k.kind];
  const char* const low = reinterpret_cast<const char*>(k.low + begin + count);
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(next + i, 1);
    if (k.kind == kSplit) __builtin_prefetch(low + i, 1);
  }
}

// Where the values are read and updated: their own memory, if they lie there in fp32, else `buffer`.
inline float* view(const Kept& k, int64_t begin, int64_t count, float* buffer) {
  if (k.kind == kFp32) return static_cast<float*>(k.at) + begin;
  load(k, begin, count, buffer);
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

void lp_adamw(const Numbers* numbers, const Kept* weight, const Kept* moment, const Kept* variance, const Kept* gradient,
              int64_t count, int threads) {
  const Numbers c = *numbers;
  const bool is_near = std::fabs(c.rest) < 0.5f;
  const float coefficient = is_near ? c.rest : c.rest - 1.0f;
  for_blocks(count, threads, [&](int64_t begin, int64_t size) {
    alignas(64) float buffer[4][kBlock];
    alignas(64) uint32_t words[kWords];
    float* const w = view(*weight, begin, size, buffer[0]);
    float* const m = view(*moment, begin, size, buffer[1]);
    float* const v = view(*variance, begin, size, buffer[2]);
    const float* const g = view(*gradient, begin, size, buffer[3]);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float x = g[i] * c.unscale;
      m[i] = std::fma(coefficient, x - m[i], is_near ? m[i] : x);
      v[i] = std::fma(c.rest2 * x, x, v[i] * c.beta2);
      const float denominator = std::sqrt(v[i]) / c.root + c.eps;
      w[i] = w[i] * c.decay + (c.size * m[i]) / denominator;
    }
    for (const Kept* each : {weight, moment, variance, gradient}) fetch_next(*each, begin, size);
    round_and_store(*moment, begin, size, m, words);
    round_and_store(*variance, begin, size, v, words);
    round_and_store(*weight, begin, size, w, words);
  });
}

// gradient_rounding: how AXPY (1) is rounded; nothing is kept there.
void lp_sgd(const Numbers* numbers, const Kept* weight, const Kept* moment, const Kept* gradient, const Kept* gradient_rounding,
            int64_t count, int threads) {
  const double unscale = numbers->unscale, lambda = numbers->decay, m = numbers->beta, eta = numbers->rest;
  for_blocks(count, threads, [&](int64_t begin, int64_t size) {
    alignas(64) float buffer[4][kBlock];
    alignas(64) uint32_t words[kWords];
    float* const w = view(*weight, begin, size, buffer[0]);
    float* const old = view(*moment, begin, size, buffer[1]);
    const float* const given = view(*gradient, begin, size, buffer[2]);
    float* const g = buffer[3];
    for (const Kept* each : {weight, moment, gradient}) fetch_next(*each, begin, size);
    combine(*gradient_rounding, unscale, given, lambda, w, begin, size, g, words);
    combine(*moment, m, old, eta, g, begin, size, old, words);
    combine(*weight, 1.0, w, 1.0, old, begin, size, w, words);
    store(*moment, begin, size, old);
    store(*weight, begin, size, w);
  });
}
}
