// Cast: round fp32 (fp16, bf16) onto the grid of a number format, bit for bit as runtime/numerics/casts.py does.
//
// With y = x / scale, a = |y|, and bits(a) the IEEE pattern of a, both halves below are computed and one is selected,
// so that the loop has no branch and the compiler vectorises it:
//
//   a >= low   the format's precision is constant: add to bits(a), clear the bits below the last kept one.
//              nearest_even adds half - 1 + (last kept bit), nearest_away half, toward_zero 0, stochastic random bits.
//   a <  low   the spacing is constant (subnormals, all integers): r = (a + magic) - magic with magic = 2^23 spacing,
//              whose ulp is the spacing, so fp32's own nearest-even does the work; d = a - r is exact and moves r one
//              step up (d >= up_at: ties away) or down (d < down_below: toward zero).
//
// A format with nothing between 0 and its smallest value has spacing = low = that value and a magic so large that r = 0.
// An integer format has spacing 1 and low = 2^23, from where on every fp32 is an integer.
//
// A table (nf4) is a step function of y: values[number of thresholds that y has reached], one select per threshold.
//
// A block format (mxfp8, nvfp4) is rounded block by block: amax of the block, its scale, the elements on the grid of a
// CastPlan, and back; the order of fp32 operations is that of runtime/numerics/block_casts.py.
//
// Plain C++17, no headers of torch; called through ctypes by runtime/kernels/cast/. Needs -ffp-contract=off semantics
// and no -ffast-math: `(a + magic) - magic` must stay as written.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "bits.h"
#include "cast_round.h"
#include "codes.h"
#include "huge_pages.h"
#include "loads.h"
#include "philox.h"
#include "rotate.h"
#include "rounding.h"
#include "strided.h"

namespace {

// Mirrors TablePlan: the table continued by one value past each end, so that overflow is judged after rounding.
struct TablePlan {
  int64_t count;       // of values; there are count - 1 thresholds
  float values[LP_MAX_TABLE];  // the last is repeated to the end, which starts at Inf
  // starts[i]: the least y that values[i] is chosen for; starts[0] is not read. stochastic: starts[i] = values[i], and
  // chance decides between values[i] and values[i + 1].
  float starts[LP_MAX_TABLE];
  float max, min, zero;
};

// 1 if q is not in [min, max], and for NaN.
inline uint32_t is_beyond(float q, float min, float max) { return uint32_t(!(q <= max)) | uint32_t(!(q >= min)); }

// x and out may be the same memory: element i is read before it is written, and no loop looks at another one.
//
// One run of elements that shares a scale (Step 0) or has one each (Step 1); `back`: whether its values are multiplied by
// it at the end. True if a value lay out of range, or a NaN.
template <class In, bool Scaled, int Step, Chance C>
bool cast_run(const CastPlan& plan, const typename In::Storage* x, float* out, int64_t count,
              const float* __restrict scale, bool back, const uint32_t* __restrict words) {
  const CastPlan p = plan;
  const uint32_t taken = back ? 0xffffffffu : 0u, one = ~taken & bits_of(1.0f);
  uint32_t beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int64_t i = 0; i < count; ++i) {
    const float value = In::load(x[i]), s = Scaled ? scale[Step * i] : 1.0f;
    const float q = rounded<C>(p, Scaled ? value / s : value, C != kFixed ? words[i] : 0);
    beyond |= is_beyond(q, p.min, p.max);
    const float kept = saturated(q, p.min, p.max) + p.zero;
    out[i] = Scaled ? kept * float_of((bits_of(s) & taken) | one) : kept;  // a branch here would end the vectors
  }
  return beyond != 0;
}

// q: the value of the last start that y has reached, above: the one after it, of sixteen y. By bisection in registers with
// AVX-512, else one comparison per start; NaN has reached none.
inline void look_up(const TablePlan& plan, const float* y, float* q, float* above) {
#ifdef __AVX512F__
  const auto entry = [](const float* table, __m512i index, bool is_long) {
    const __m512 low =
        _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
    if (!is_long) return low;
    const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), index, _mm512_loadu_ps(table + 48));
    return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), high);
  };
  const bool is_long = plan.count > 32;
  const __m512 v = _mm512_loadu_ps(y);
  __m512i index = _mm512_setzero_si512();
  for (int step = is_long ? 32 : 16; step; step /= 2) {
    const __m512i further = _mm512_or_si512(index, _mm512_set1_epi32(step));
    const __mmask16 is_reached = _mm512_cmp_ps_mask(v, entry(plan.starts, further, is_long), _CMP_GE_OQ);
    index = _mm512_mask_mov_epi32(index, is_reached, further);
  }
  _mm512_storeu_ps(q, entry(plan.values, index, is_long));
  if (above == nullptr) return;
  const __m512i next = _mm512_min_epi32(_mm512_add_epi32(index, _mm512_set1_epi32(1)), _mm512_set1_epi32(63));
  _mm512_storeu_ps(above, entry(plan.values, next, is_long));
#else
  float behind[16];
  for (int i = 0; i < 16; ++i) q[i] = plan.values[0], behind[i] = plan.values[1];
  for (int64_t at = 1; at < plan.count; ++at) {
    const float start = plan.starts[at], here = plan.values[at], next = plan.values[at + 1];
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const bool is_reached = y[i] >= start;
      q[i] = is_reached ? here : q[i];
      behind[i] = is_reached ? next : behind[i];
    }
  }
  if (above != nullptr) std::memcpy(above, behind, sizeof(behind));
#endif
}

// The same on a table, sixteen elements at a time; what is behind the last element is computed and not kept.
template <class In, bool Scaled, int Step, Chance C>
bool cast_run(const TablePlan& plan, const typename In::Storage* x, float* out, int64_t count,
              const float* __restrict scale, bool back, const uint32_t* __restrict words) {
  constexpr int64_t kLanes = 16;
  uint32_t beyond = 0;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t lanes = std::min(kLanes, count - first);
    float y[kLanes], factor[kLanes], q[kLanes], above[kLanes];
    uint32_t word[kLanes];
    const auto load = [&](int64_t i) {
      const float value = In::load(x[first + i]), s = Scaled ? scale[Step * (first + i)] : 1.0f;
      y[i] = Scaled ? value / s : value;
      factor[i] = back ? s : 1.0f;
      word[i] = C != kFixed ? words[first + i] : 0;
    };
    if (lanes == kLanes) {
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) load(i);
    } else {
      for (int64_t i = 0; i < kLanes; ++i) y[i] = 0.0f, factor[i] = 1.0f, word[i] = 0;
      for (int64_t i = 0; i < lanes; ++i) load(i);
    }
    look_up(plan, y, q, C != kFixed ? above : nullptr);
#pragma omp simd reduction(| : beyond)
    for (int64_t i = 0; i < kLanes; ++i) {
      float chosen = q[i];
      if (C != kFixed) {
        const bool mirrored = above[i] <= 0.0f;  // `near` is the smaller in magnitude
        const double near = mirrored ? above[i] : q[i], far = mirrored ? q[i] : above[i];
        const double inside = std::max(double(y[i]), double(plan.values[0]));
        const bool is_far = std::abs(inside - near) / std::abs(far - near) >= 1.0 - word[i] * 0x1p-32;
        chosen = q[i] == above[i] ? q[i] : float(is_far ? far : near);
      }
      chosen = chosen == 0.0f ? std::copysign(0.0f, y[i]) : chosen;
      chosen = y[i] != y[i] ? y[i] : chosen;
      beyond |= i < lanes ? is_beyond(chosen, plan.min, plan.max) : 0;
      q[i] = (saturated(chosen, plan.min, plan.max) + plan.zero) * factor[i];
    }
    if (lanes == kLanes) {
      std::memcpy(out + first, q, sizeof(q));
    } else {
      std::memcpy(out + first, q, size_t(lanes) * sizeof(float));
    }
  }
  return beyond != 0;
}

// What a cast writes: values of a type, or codes of so many bytes; and where it leaves max |x| of what it read, if anywhere.
struct Target {
  int type;
  const CodePlan* codes = nullptr;
  float* amax = nullptr;
};
constexpr int kCodes = 4, kWideCodes = 5, kWidestCodes = 6;  // types beyond OutType: uint8, int32, int64

inline void store(const float* from, void* to, int64_t at, int64_t count, Target target) {
  if (target.type == kCodes) {
    encode_run(*target.codes, from, static_cast<uint8_t*>(to) + at, count);
  } else if (target.type == kWideCodes) {
    encode_run(*target.codes, from, static_cast<int32_t*>(to) + at, count);
  } else if (target.type == kWidestCodes) {
    encode_run(*target.codes, from, static_cast<int64_t*>(to) + at, count);
  } else {
    narrow(from, to, at, count, target.type);
  }
}

constexpr int64_t kRun = 4096;  // elements a run has at most: its random words stay in the first-level cache
constexpr int64_t kWords = kRun + 136;  // words before and behind those of a run included

// max |x| of the elements [begin, end). On IEEE patterns without the sign, integer order is the order of magnitudes, and
// every NaN lies above Inf: a NaN among them gives a NaN.
template <class Bits>
Bits amax_of(const Bits* __restrict x, int64_t begin, int64_t end, Bits top) {
  const Bits mask = Bits(~Bits(0)) >> 1;
#pragma omp simd reduction(max : top)
  for (int64_t i = begin; i < end; ++i) top = std::max<Bits>(top, x[i] & mask);
  return top;
}

// The pattern of a magnitude as a float, into `amax` if it is larger: patterns of magnitudes are ordered as they are.
inline void raise(float* amax, float magnitude) {
#pragma omp critical(lp_amax)
  if (bits_of(magnitude) > bits_of(*amax)) *amax = magnitude;
}

// Elements [begin, end) of the flat tensor, cut where the scale changes. Tile (i, j) of the matrix has scale[i tiles + j].
template <class In, bool Scaled, Chance C, class Plan>
bool cast_range(const Plan& plan, const typename In::Storage* x, void* out, Target target, int64_t begin, int64_t end,
                int64_t columns, const float* scale, int64_t tile_rows, int64_t tile_columns,
                bool back, const RandomPlan& random) {
  const int64_t tiles = (columns + tile_columns - 1) / tile_columns;
  const bool each = Scaled && tile_columns == 1, is_cut = Scaled || C != kFixed || target.type != kFp32;
  std::vector<uint32_t> buffer(C != kFixed ? kWords : 0);
  std::vector<float> wide(target.type == kFp32 ? 0 : kRun);
  using Bits = std::conditional_t<sizeof(typename In::Storage) == 4, uint32_t, uint16_t>;
  Bits top = 0;
  bool beyond = false;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / columns, column = at % columns;
    const int64_t tile = each ? column : column / tile_columns;
    const int64_t tile_end = each ? columns : std::min(columns, (tile + 1) * tile_columns);
    const int64_t count = std::min({end - at, tile_end - column, is_cut ? kRun : end - at});
    const float* s = Scaled ? scale + (row / tile_rows) * tiles + tile : nullptr;
    const uint32_t* words = nullptr;
    if (C != kFixed) {
      const int64_t element = random.offset + at, first = element / 4;
      philox(random, first, (element + count + 3) / 4 - first, buffer.data());
      words = buffer.data() + element % 4;
    }
    if (target.amax != nullptr) top = amax_of(reinterpret_cast<const Bits*>(x), at, at + count, top);
    float* const to = target.type == kFp32 ? static_cast<float*>(out) + at : wide.data();
    beyond |= each ? cast_run<In, Scaled, 1, C>(plan, x + at, to, count, s, back, words)
                   : cast_run<In, Scaled, 0, C>(plan, x + at, to, count, s, back, words);
    if (target.type != kFp32) {
      // the next run's values come while this one's are written: what the unit fetches by itself stops with each run
      const auto* next = x + at + count;
      for (int64_t i = 0; i < std::min(end - at - count, kRun); i += int64_t(64 / sizeof(*next))) __builtin_prefetch(next + i);
      store(to, out, at, count, target);
    }
    at += count;
  }
  if (target.amax != nullptr) {
    typename In::Storage largest;
    std::memcpy(&largest, &top, sizeof(largest));
    raise(target.amax, In::load(largest));
  }
  return beyond;
}

template <class In>
auto range_of(const CastPlan& plan, bool is_scaled, bool is_stochastic) {
  switch (chance_of(plan, is_stochastic)) {
    case kFixed: return is_scaled ? cast_range<In, true, kFixed, CastPlan> : cast_range<In, false, kFixed, CastPlan>;
    case kBits: return is_scaled ? cast_range<In, true, kBits, CastPlan> : cast_range<In, false, kBits, CastPlan>;
    case kSingle: return is_scaled ? cast_range<In, true, kSingle, CastPlan> : cast_range<In, false, kSingle, CastPlan>;
    default: return is_scaled ? cast_range<In, true, kDouble, CastPlan> : cast_range<In, false, kDouble, CastPlan>;
  }
}

template <class In>
auto range_of(const TablePlan&, bool is_scaled, bool is_stochastic) {
  if (is_stochastic) return is_scaled ? cast_range<In, true, kDouble, TablePlan> : cast_range<In, false, kDouble, TablePlan>;
  return is_scaled ? cast_range<In, true, kFixed, TablePlan> : cast_range<In, false, kFixed, TablePlan>;
}

template <class In, class Plan>
bool cast_all(const Plan& plan, const void* x, void* out, Target target, int64_t rows, int64_t columns, const float* scale,
              int64_t tile_rows, int64_t tile_columns, bool back, const RandomPlan* random, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  const int64_t count = rows * columns;
  const RandomPlan draw = random ? *random : RandomPlan{};
  const auto range = range_of<In>(plan, scale != nullptr, random != nullptr);
  int beyond = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : beyond)
  for (int part = 0; part < threads; ++part) {
    // parts begin at multiples of 64 elements, so that no two threads write one cache line
    const int64_t share = (count / threads + 64) & ~int64_t(63);
    const int64_t begin = std::min(count, part * share), end = std::min(count, begin + share);
    beyond |= range(plan, typed, out, target, begin, end, columns, scale, tile_rows, tile_columns, back, draw);
  }
  return beyond != 0;
}

// The same of a matrix whose rows or columns lie apart: a few rows at a time are laid out where they stay in a cache.
template <class In, class Plan>
bool cast_strided(const Plan& plan, const void* x, void* out, Target target, int64_t rows, int64_t columns, int64_t row_stride,
                  int64_t column_stride, const float* scale, int64_t tile_rows, int64_t tile_columns, bool back,
                  const RandomPlan* random, int threads) {
  constexpr int64_t kBand = 16;
  const auto* typed = static_cast<const typename In::Storage*>(x);
  const RandomPlan draw = random ? *random : RandomPlan{};
  const auto range = range_of<In>(plan, scale != nullptr, random != nullptr);
  int beyond = 0;
#pragma omp parallel num_threads(threads) reduction(| : beyond)
  {
    std::vector<typename In::Storage> laid(kBand * columns);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row += kBand) {
      const int64_t height = std::min(kBand, rows - row), begin = row * columns;
      copy_rows(typed + row * row_stride, laid.data(), height, columns, row_stride, column_stride);
      beyond |= range(plan, laid.data() - begin, out, target, begin, begin + height * columns, columns, scale, tile_rows,
                      tile_columns, back, draw);
    }
  }
  return beyond != 0;
}

// Columns of one element: the running maximum of a row of tiles.
template <class Bits>
void amax_columns(const Bits* __restrict line, Bits* __restrict top, int64_t columns) {
  const Bits mask = Bits(~Bits(0)) >> 1;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) top[j] = std::max<Bits>(top[j], line[j] & mask);
}

// max |x| tile by tile over the rows [begin, end) of the matrix; tiles cut by another thread's rows are merged.
template <class Bits>
void amax_rows(const Bits* x, Bits* out, int64_t begin, int64_t end, int64_t rows, int64_t columns, int64_t tile_rows,
               int64_t tile_columns) {
  const int64_t tiles = (columns + tile_columns - 1) / tile_columns;
  std::vector<Bits> largest(tiles);
  for (int64_t row = begin; row < end;) {
    const int64_t band = row / tile_rows, band_end = std::min(rows, (band + 1) * tile_rows);
    const bool is_whole = row == band * tile_rows && band_end <= end;
    std::fill(largest.begin(), largest.end(), Bits(0));
    for (; row < std::min(band_end, end); ++row) {
      const Bits* line = x + row * columns;
      if (tile_columns == 1) {
        amax_columns(line, largest.data(), columns);
        continue;
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * tile_columns;
        largest[tile] = amax_of(line, first, std::min(columns, first + tile_columns), largest[tile]);
      }
    }
    Bits* result = out + band * tiles;
    if (is_whole) {
      std::copy(largest.begin(), largest.end(), result);
    } else {
#pragma omp critical(lp_amax)
      for (int64_t tile = 0; tile < tiles; ++tile) result[tile] = std::max(result[tile], largest[tile]);
    }
  }
}

// scale = fp32(amax / max), or the smallest power of two not below it; 1 if amax is 0, Inf or NaN. As in scaling.py.
float scale_of(float amax, double max, bool is_pow2) {
  if (!(amax > 0.0f && amax <= std::numeric_limits<float>::max())) return 1.0f;
  double scale = amax / max;
  if (is_pow2) {
    int exponent;
    const double fraction = std::frexp(scale, &exponent);
    scale = std::ldexp(1.0, std::clamp(exponent - (fraction == 0.5), -126, 127));
  }
  return float(std::clamp(scale, 0x1p-126, double(std::numeric_limits<float>::max())));
}

template <class In>
void scale_all(const void* x, float* out, int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
               double max, bool is_pow2, int threads) {
  using Bits = std::conditional_t<sizeof(typename In::Storage) == 4, uint32_t, uint16_t>;
  const auto* bits = static_cast<const Bits*>(x);
  const int64_t bands = (rows + tile_rows - 1) / tile_rows, tiles = (columns + tile_columns - 1) / tile_columns;
  std::vector<Bits> amax(bands * tiles, Bits(0));
  const bool is_one_tile = bands * tiles == 1;
  const int64_t items = is_one_tile ? rows * columns : rows;  // what is shared out: elements of the one tile, or rows
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = items * part / threads, end = items * (part + 1) / threads;
    if (!is_one_tile) {
      amax_rows(bits, amax.data(), begin, end, rows, columns, tile_rows, tile_columns);
      continue;
    }
    const Bits top = amax_of(bits, begin, end, Bits(0));
#pragma omp critical(lp_amax)
    amax[0] = std::max(amax[0], top);
  }
  for (int64_t i = 0; i < bands * tiles; ++i) {
    typename In::Storage value;
    std::memcpy(&value, &amax[i], sizeof(value));
    out[i] = scale_of(In::load(value), max, is_pow2);
  }
}

constexpr int64_t kRunBlocks = kRun / 16;
using RunScales = BlockScales<kRunBlocks>;

// A run of elements along which a block's factor and scale stay (Step 0) or change with each (Step 1).
template <class In, int Step, Chance C>
inline void cast_block(const BlockPlan& plan, const typename In::Storage* x, float* out,
                       int64_t count, const float* __restrict factor, const float* __restrict scale, float divisor,
                       bool is_divided, const uint32_t* __restrict words) {
  const CastPlan p = plan.element;
  const float unit = plan.unit, per_unit = 1.0f / unit;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float y = In::load(x[i]) * factor[Step * i] * per_unit;
    const float q = rounded<C>(p, y, C != kFixed ? words[i] : 0);
    out[i] = (saturated(q, p.min, p.max) + p.zero) * unit * scale[Step * i];
  }
  if (is_divided) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] /= divisor;
  }
}

// The elements alone, in units of the scale; 0 in a block whose scale is NaN.
template <class In, Chance C>
inline void elements_of_block(const BlockPlan& plan, const typename In::Storage* x, float* out, int64_t count,
                              float factor, const uint32_t* __restrict words) {
  const CastPlan p = plan.element;
  const float per_unit = 1.0f / plan.unit;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float q = rounded<C>(p, In::load(x[i]) * factor * per_unit, C != kFixed ? words[i] : 0);
    out[i] = q != q ? 0.0f : saturated(q, p.min, p.max) + p.zero;
  }
}

// The largest of each 16 columns in all of them: blocks that are tiles.
inline void widen_amax(float* amax, int64_t width) {
  for (int64_t j = 0; j < width; j += 16) {
    const int64_t end = std::min<int64_t>(j + 16, width);
    uint32_t top = 0;
    for (int64_t i = j; i < end; ++i) top = std::max(top, bits_of(amax[i]));
    std::fill(amax + j, amax + end, float_of(top));
  }
}

inline float squared_error(const CastPlan& p, float y) {
  const float off = y - (saturated(rounded<kFixed>(p, y, 0), p.min, p.max) + p.zero);
  return off * off;
}

// Block i under the scale of `four` where its squared error is less, added by halves.
template <class In>
inline void take_four(const BlockPlan& plan, const typename In::Storage* x, int64_t count, RunScales& s, const RunScales& four,
                      int64_t i) {
  const CastPlan p = plan.element;
  const float factors[2] = {s.factor[i], four.factor[i]}, scales[2] = {s.scale[i], four.scale[i]};
  float found[2];
  for (int way = 0; way < 2; ++way) {
    float errors[16] = {};
    if (count == 16) {
#pragma omp simd
      for (int k = 0; k < 16; ++k) errors[k] = squared_error(p, In::load(x[k]) * factors[way]);
    } else {
      for (int64_t k = 0; k < count; ++k) errors[k] = squared_error(p, In::load(x[k]) * factors[way]);
    }
    for (int half = 8; half; half /= 2)
      for (int k = 0; k < half; ++k) errors[k] += errors[k + half];
    found[way] = errors[0] * (scales[way] * scales[way]);
  }
  if (found[1] < found[0]) s.factor[i] = four.factor[i], s.scale[i] = four.scale[i];
}

// The same for each of `width` columns, `height` rows of each. errors: 16 rows of kRunBlocks.
template <class In>
inline void take_four_columns(const BlockPlan& plan, const typename In::Storage* x, int64_t height, int64_t columns, int64_t width,
                              RunScales& s, const RunScales& four, float* __restrict errors) {
  const CastPlan p = plan.element;
  float found[2][kRunBlocks];
  for (int way = 0; way < 2; ++way) {
    const float* factor = way ? four.factor : s.factor;
    const float* scale = way ? four.scale : s.scale;
    for (int64_t i = 0; i < height; ++i) {
      const typename In::Storage* __restrict line = x + i * columns;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) errors[i * kRunBlocks + j] = squared_error(p, In::load(line[j]) * factor[j]);
    }
    std::fill(errors + height * kRunBlocks, errors + 16 * kRunBlocks, 0.0f);
    for (int64_t half = 8; half; half /= 2)
      for (int64_t i = 0; i < half; ++i)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) errors[i * kRunBlocks + j] += errors[(i + half) * kRunBlocks + j];
    for (int64_t j = 0; j < width; ++j) found[way][j] = errors[j] * (scale[j] * scale[j]);
  }
  for (int64_t j = 0; j < width; ++j) {
    const bool is_four = found[1][j] < found[0][j];
    s.factor[j] = is_four ? four.factor[j] : s.factor[j];
    s.scale[j] = is_four ? four.scale[j] : s.scale[j];
  }
}

// Blocks [begin, end) along the columns, counted row by row. `scales`: where one goes for each block; given with codes alone.
template <class In, int Block, Chance C>
int cast_blocks(const BlockPlan& plan, const typename In::Storage* x, void* out, Target target, float* scales, int64_t begin,
                int64_t end, int64_t columns, float divisor, bool is_divided, const RandomPlan& random) {
  const int64_t blocks = (columns + Block - 1) / Block;
  std::vector<uint32_t> buffer(C != kFixed ? kWords : 0);
  std::vector<float> wide(target.type == kFp32 ? 0 : kRun);
  RunScales s, four;
  int said = 0;
  for (int64_t block = begin; block < end;) {
    const int64_t row = block / blocks, column = block % blocks * Block, at = row * columns + column;
    const int64_t run = std::min({end - block, blocks - block % blocks, kRun / Block});
    const int64_t count = std::min(run * Block, columns - column);
    const uint32_t* words = nullptr;
    if (C != kFixed) {
      const int64_t element = random.offset + at, first = element / 4;
      philox(random, first, (element + count + 3) / 4 - first, buffer.data());
      words = buffer.data() + element % 4;
    }
    float* const to = target.type == kFp32 ? static_cast<float*>(out) + at : wide.data();
    const int64_t whole = count / Block, rest = count % Block;
    for (int64_t i = 0; i < whole; ++i) s.amax[i] = block_amax<In>(x + at + i * Block, Block);
    if (rest) s.amax[whole] = block_amax<In>(x + at + whole * Block, rest);
    said |= scale_blocks(plan, s, run, divisor, plan.per_max);
    if (plan.rule == LP_RULE_FOUR_SIX) {
      std::copy(s.amax, s.amax + run, four.amax);
      scale_blocks(plan, four, run, divisor, plan.per_four);
      for (int64_t i = 0; i < run; ++i) take_four<In>(plan, x + at + i * Block, i < whole ? Block : rest, s, four, i);
    }
    for (int64_t i = 0; i < run; ++i) {
      const int64_t first = i * Block;
      const auto* from = x + at + first;
      if (scales) {
        scales[block + i] = s.factor[i] != s.factor[i] ? s.factor[i] : s.scale[i];
        elements_of_block<In, C>(plan, from, to + first, i < whole ? Block : rest, s.factor[i], words + first);
      } else if (i < whole)
        cast_block<In, 0, C>(plan, from, to + first, Block, &s.factor[i], &s.scale[i], divisor, is_divided, words + first);
      else
        cast_block<In, 0, C>(plan, from, to + first, rest, &s.factor[i], &s.scale[i], divisor, is_divided, words + first);
    }
    if (target.type != kFp32) store(to, out, at, count, target);
    block += run;
  }
  return said;
}

// Random words of a strip of `width` columns, `height` rows: words[i kRunBlocks + j] of row i, column j. A matrix whose
// blocks lie along its rows draws as if it were transposed: down a column, then down the next, from element `start` on.
inline void draw_strip(const RandomPlan& random, int64_t start, int64_t rows, int64_t height, int64_t width,
                       uint32_t* __restrict words, std::vector<uint32_t>& buffer) {
  start += random.offset;
#ifdef __AVX512DQ__
  if (start % 4 == 0 && rows % 4 == 0) {  // then four rows of a column are the four words of one counter
    const __m512i stride = _mm512_set1_epi64(rows / 4), lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t i = 0; i < height; i += 4)
      for (int64_t j = 0; j < width; j += 32) {
        __m512i n[4], c[4][4];
        for (int g = 0; g < 4; ++g) {
          const __m512i column = _mm512_add_epi64(lanes, _mm512_set1_epi64(j + 8 * g));
          n[g] = _mm512_add_epi64(_mm512_mullo_epi64(column, stride), _mm512_set1_epi64((start + i) / 4));
        }
        philox_rounds<4>(random, n, c);
        for (int w = 0; w < 4; ++w)
          for (int g = 0; g < 4; ++g)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + (i + w) * kRunBlocks + j + 8 * g),
                                _mm512_cvtepi64_epi32(c[g][w]));
      }
    return;
  }
#endif
  for (int64_t j = 0; j < width; ++j) {
    const int64_t element = start + j * rows, first = element / 4;
    philox(random, first, (element + height + 3) / 4 - first, buffer.data());
    for (int64_t i = 0; i < height; ++i) words[i * kRunBlocks + j] = buffer[size_t(element % 4 + i)];
  }
}

// Blocks along the rows of each [rows, columns] matrix: bands [begin, end) of Block rows, matrix by matrix.
template <class In, int Block, Chance C>
int cast_bands(const BlockPlan& plan, const typename In::Storage* x, void* out, int type, int64_t begin, int64_t end,
               int64_t rows, int64_t columns, float divisor, bool is_divided, const RandomPlan& random) {
  const int64_t bands = (rows + Block - 1) / Block;
  std::vector<uint32_t> buffer(C != kFixed ? kWords : 0), words(C != kFixed ? Block * kRunBlocks : 0);
  std::vector<float> wide(type == kFp32 ? 0 : kRunBlocks), errors(plan.rule == LP_RULE_FOUR_SIX ? 16 * kRunBlocks : 0);
  RunScales s, four;
  int said = 0;
  for (int64_t band = begin; band < end; ++band) {
    const int64_t matrix = band / bands, row = band % bands * Block, height = std::min<int64_t>(Block, rows - row);
    for (int64_t column = 0; column < columns; column += kRunBlocks) {
      const int64_t width = std::min(kRunBlocks, columns - column), base = matrix * rows * columns;
      const auto* from = x + base + row * columns + column;
      column_amax<In>(from, height, columns, width, s.amax);
      if (plan.height > 1) widen_amax(s.amax, width);
      said |= scale_blocks(plan, s, width, divisor, plan.per_max);
      if (plan.rule == LP_RULE_FOUR_SIX) {
        std::copy(s.amax, s.amax + width, four.amax);
        scale_blocks(plan, four, width, divisor, plan.per_four);
        take_four_columns<In>(plan, from, height, columns, width, s, four, errors.data());
      }
      if (C != kFixed) draw_strip(random, base + column * rows + row, rows, height, width, words.data(), buffer);
      for (int64_t i = 0; i < height; ++i) {
        const int64_t at = base + (row + i) * columns + column;
        float* const to = type == kFp32 ? static_cast<float*>(out) + at : wide.data();
        cast_block<In, 1, C>(plan, x + at, to, width, s.factor, s.scale, divisor, is_divided, words.data() + i * kRunBlocks);
        if (type != kFp32) narrow(to, out, at, width, type);
      }
    }
  }
  return said;
}

template <class In, int Block, Chance C>
int cast_all_blocks(const BlockPlan& plan, const void* x, void* out, Target target, float* scales, int64_t matrices,
                    int64_t rows, int64_t columns, bool is_column, float divisor, bool is_divided,
                    const RandomPlan& random, const TurnPlan* turn, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  const int64_t count = is_column ? matrices * ((rows + Block - 1) / Block) : rows * ((columns + Block - 1) / Block);
  int said = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : said)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = count * part / threads, end = count * (part + 1) / threads;
    if (turn) {
      const int64_t blocks = (columns + Block - 1) / Block, bands = (rows + Block - 1) / Block;
      turn_pieces<In>(*turn, typed, matrices, rows, columns, is_column, std::max<int64_t>(turn->size, Block), part, threads,
                      [&](const float* y, int64_t from, int64_t to) {
                        const int64_t band = from / rows * bands + from % rows / Block;
                        said |= is_column ? cast_bands<Fp32, Block, C>(plan, y, out, target.type, band, band + (to - from + Block - 1) / Block,
                                                                       rows, columns, divisor, is_divided, random)
                                          : cast_blocks<Fp32, Block, C>(plan, y, out, target, scales, from * blocks, to * blocks, columns,
                                                                        divisor, is_divided, random);
                      });
      continue;
    }
    said |= is_column
                ? cast_bands<In, Block, C>(plan, typed, out, target.type, begin, end, rows, columns, divisor, is_divided, random)
                : cast_blocks<In, Block, C>(plan, typed, out, target, scales, begin, end, columns, divisor, is_divided, random);
  }
  return said;
}

template <class In, int Block>
int cast_all_blocks(const BlockPlan& plan, const void* x, void* out, Target target, float* scales, int64_t matrices,
                    int64_t rows, int64_t columns, bool is_column, float divisor, bool is_divided,
                    const RandomPlan* random, const TurnPlan* turn, int threads) {
  const Chance chance = chance_of(plan.element, random != nullptr);
  const RandomPlan draw = random ? *random : RandomPlan{};
  const auto cast = chance == kFixed    ? cast_all_blocks<In, Block, kFixed>
                    : chance == kSingle ? cast_all_blocks<In, Block, kSingle>
                                        : cast_all_blocks<In, Block, kDouble>;
  return cast(plan, x, out, target, scales, matrices, rows, columns, is_column, divisor, is_divided, draw, turn, threads);
}

auto blocks_of(const BlockPlan& plan, int dtype) {
  const bool is_short = plan.block == 16;
  return dtype == 0   ? (is_short ? cast_all_blocks<Fp32, 16> : cast_all_blocks<Fp32, 32>)
         : dtype == 1 ? (is_short ? cast_all_blocks<Bf16, 16> : cast_all_blocks<Bf16, 32>)
                      : (is_short ? cast_all_blocks<Fp16, 16> : cast_all_blocks<Fp16, 32>);
}

inline float finite(float amax) { return amax <= std::numeric_limits<float>::max() ? amax : 0.0f; }

// max |x| over the blocks that hold neither NaN nor Inf.
template <class In, int Block>
float finite_amax(const void* x, int64_t matrices, int64_t rows, int64_t columns, bool is_column, bool is_square, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  const int64_t bands = (rows + Block - 1) / Block, items = is_column ? matrices * bands : rows;
  float whole = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : whole)
  for (int64_t item = 0; item < items; ++item) {
    if (!is_column) {
      for (int64_t first = 0; first < columns; first += Block) {
        const auto* block = typed + item * columns + first;
        const int64_t count = std::min<int64_t>(Block, columns - first);
        whole = std::max(whole, finite(count == Block ? block_amax<In>(block, Block) : block_amax<In>(block, count)));
      }
      continue;
    }
    const int64_t row = item / bands * rows + item % bands * Block;
    const int64_t height = std::min<int64_t>(Block, rows - item % bands * Block);
    float amax[kRunBlocks];
    for (int64_t column = 0; column < columns; column += kRunBlocks) {
      const int64_t width = std::min(kRunBlocks, columns - column);
      column_amax<In>(typed + row * columns + column, height, columns, width, amax);
      if (is_square) widen_amax(amax, width);
      for (int64_t j = 0; j < width; ++j) whole = std::max(whole, finite(amax[j]));
    }
  }
  return whole;
}

template <class In>
float turned_amax(const TurnPlan& turn, const void* x, int64_t matrices, int64_t rows, int64_t columns, bool is_column, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  float whole = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : whole)
  for (int part = 0; part < threads; ++part)
    turn_pieces<In>(turn, typed, matrices, rows, columns, is_column, turn.size, part, threads,
                    [&](const float* y, int64_t from, int64_t to) {
                      whole = std::max(whole, finite_amax<Fp32, 16>(y + from * columns, 1, to - from, columns, is_column, false, 1));
                    });
  return whole;
}

}  // namespace

extern "C" {

// dtype: 0 fp32, 1 bf16, 2 fp16; type of out: these and 3 int8. scale: null, or one fp32 per tile of the [rows, columns]
// matrix, by which values are multiplied at the end if `back`. random: null unless stochastic. Returns 1 if any value rounded out of range or was NaN, else 0.
int lp_cast(const CastPlan* plan, const void* x, int dtype, void* out, int type, int64_t rows, int64_t columns,
            const float* scale, int64_t tile_rows, int64_t tile_columns, int back, const RandomPlan* random,
            int threads) {
  ask_for_huge_pages(out, rows * columns * kOutBytes[type]);
  const auto cast =
      dtype == 0 ? cast_all<Fp32, CastPlan> : dtype == 1 ? cast_all<Bf16, CastPlan> : cast_all<Fp16, CastPlan>;
  return cast(*plan, x, out, Target{type}, rows, columns, scale, tile_rows, tile_columns, back != 0, random, threads);
}

// The same for a table.
int lp_cast_table(const TablePlan* plan, const void* x, int dtype, void* out, int type, int64_t rows, int64_t columns,
                  const float* scale, int64_t tile_rows, int64_t tile_columns, int back, const RandomPlan* random,
            int threads) {
  ask_for_huge_pages(out, rows * columns * kOutBytes[type]);
  const auto cast =
      dtype == 0 ? cast_all<Fp32, TablePlan> : dtype == 1 ? cast_all<Bf16, TablePlan> : cast_all<Fp16, TablePlan>;
  return cast(*plan, x, out, Target{type}, rows, columns, scale, tile_rows, tile_columns, back != 0, random, threads);
}

// lp_cast, or lp_cast_table where `table` is given, of `count` elements under one scale; amax, 0 before: max |x|, NaN where x
// holds one, found in the same pass.
int lp_cast_observed(const CastPlan* plan, const TablePlan* table, const void* x, int dtype, void* out, int type, int64_t count,
                     const float* scale, const RandomPlan* random, float* amax, int threads) {
  ask_for_huge_pages(out, count * kOutBytes[type]);
  const Target target{type, nullptr, amax};
  const auto run = [&](const auto& given, auto cast) {
    return int(cast(given, x, out, target, 1, count, scale, 1, count, false, random, threads));
  };
  if (table)
    return run(*table, dtype == 0 ? cast_all<Fp32, TablePlan> : dtype == 1 ? cast_all<Bf16, TablePlan> : cast_all<Fp16, TablePlan>);
  return run(*plan, dtype == 0 ? cast_all<Fp32, CastPlan> : dtype == 1 ? cast_all<Bf16, CastPlan> : cast_all<Fp16, CastPlan>);
}

// lp_cast, or lp_cast_table where `table` is given, of a matrix with strides, in elements; out is contiguous and apart from x.
int lp_cast_strided(const CastPlan* plan, const TablePlan* table, const void* x, int dtype, void* out, int type, int64_t rows,
                    int64_t columns, int64_t row_stride, int64_t column_stride, const float* scale, int64_t tile_rows,
                    int64_t tile_columns, int back, const RandomPlan* random, int threads) {
  ask_for_huge_pages(out, rows * columns * kOutBytes[type]);
  const auto run = [&](const auto& given, auto cast) {
    return int(cast(given, x, out, Target{type}, rows, columns, row_stride, column_stride, scale, tile_rows, tile_columns,
                    back != 0, random, threads));
  };
  if (table)
    return run(*table, dtype == 0   ? cast_strided<Fp32, TablePlan>
                       : dtype == 1 ? cast_strided<Bf16, TablePlan>
                                    : cast_strided<Fp16, TablePlan>);
  return run(*plan, dtype == 0   ? cast_strided<Fp32, CastPlan>
                    : dtype == 1 ? cast_strided<Bf16, CastPlan>
                                 : cast_strided<Fp16, CastPlan>);
}

// The codes of x / scale, of which `bytes` hold one each: by `plan`, or by `table` where it is given. Returns as lp_cast does.
int lp_encode(const CastPlan* plan, const TablePlan* table, const CodePlan* codes, const void* x, int dtype, void* out, int bytes,
              int64_t rows, int64_t columns, const float* scale, int64_t tile_rows, int64_t tile_columns,
              const RandomPlan* random, int threads) {
  ask_for_huge_pages(out, rows * columns * bytes);
  const Target target{bytes == 1 ? kCodes : bytes == 4 ? kWideCodes : kWidestCodes, codes};
  const auto run = [&](const auto& given, auto cast) {
    return int(cast(given, x, out, target, rows, columns, scale, tile_rows, tile_columns, false, random, threads));
  };
  if (table)
    return run(*table, dtype == 0 ? cast_all<Fp32, TablePlan> : dtype == 1 ? cast_all<Bf16, TablePlan> : cast_all<Fp16, TablePlan>);
  return run(*plan, dtype == 0 ? cast_all<Fp32, CastPlan> : dtype == 1 ? cast_all<Bf16, CastPlan> : cast_all<Fp16, CastPlan>);
}

// Blocks of 16 elements under the rule two_level, else of 32: along the columns of a [rows, columns] matrix, or, if
// is_column, along the rows of each of `matrices` ones. divisor: S of two_level; is_divided: whether values are divided by
// it. turn: null, or what turns x along the blocks first. Returns 1 if a block held NaN or Inf, plus 2 if a value may be too
// fine for bf16.
int lp_cast_blocks(const BlockPlan* plan, const void* x, int dtype, void* out, int type, int64_t matrices, int64_t rows,
                   int64_t columns, int is_column, float divisor, int is_divided, const RandomPlan* random,
                   const TurnPlan* turn, int threads) {
  ask_for_huge_pages(out, matrices * rows * columns * kOutBytes[type]);
  if (!is_column) rows *= matrices, matrices = 1;
  return blocks_of(*plan, dtype)(*plan, x, out, Target{type}, nullptr, matrices, rows, columns, is_column != 0, divisor,
                                 is_divided != 0, random, turn, threads);
}

// Codes of the elements, one byte each, of blocks along the columns, and one fp32 scale a block, NaN where it holds NaN or
// Inf; in units of which the elements are.
void lp_encode_blocks(const BlockPlan* plan, const CodePlan* codes, const void* x, int dtype, void* out, float* scales,
                      int64_t rows, int64_t columns, float divisor, const RandomPlan* random, int threads) {
  ask_for_huge_pages(out, rows * columns);
  blocks_of(*plan, dtype)(*plan, x, out, Target{kCodes, codes}, scales, 1, rows, columns, false, divisor, false, random,
                          nullptr, threads);
}

// max |x| over the blocks of 16 elements, laid as above, that hold neither NaN nor Inf; 0 if there is none.
// is_square, with is_column: over tiles of 16 x 16. turn: null, or what turns x first; not with is_square.
float lp_finite_amax(const void* x, int dtype, int64_t matrices, int64_t rows, int64_t columns, int is_column, int is_square,
                     const TurnPlan* turn, int threads) {
  const auto amax = dtype == 0 ? finite_amax<Fp32, 16> : dtype == 1 ? finite_amax<Bf16, 16> : finite_amax<Fp16, 16>;
  if (!is_column) rows *= matrices, matrices = 1;
  if (turn) {
    const auto turned = dtype == 0 ? turned_amax<Fp32> : dtype == 1 ? turned_amax<Bf16> : turned_amax<Fp16>;
    return turned(*turn, x, matrices, rows, columns, is_column != 0, threads);
  }
  return amax(x, matrices, rows, columns, is_column != 0, is_square != 0, threads);
}

// out: one fp32 scale per tile of the [rows, columns] matrix, row-major. max: the format's largest value.
void lp_scale(const void* x, int dtype, float* out, int64_t rows, int64_t columns, int64_t tile_rows,
              int64_t tile_columns, double max, int is_pow2, int threads) {
  const auto scale = dtype == 0 ? scale_all<Fp32> : dtype == 1 ? scale_all<Bf16> : scale_all<Fp16>;
  scale(x, out, rows, columns, tile_rows, tile_columns, max, is_pow2 != 0, threads);
}
}
