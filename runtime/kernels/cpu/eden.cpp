// MS-EDEN: elements to nearest under the scales of their blocks, which are then corrected, bit for bit as the rule `eden` of
// runtime/numerics/block_casts.py: 8 blocks of 16 share the correction <x, x> / <x, q(x)>, in fp32, added by halves, and each
// corrected scale is rounded again, stochastically with the word of its block.
//
// Along the columns of a matrix a span is 128 elements of a row; along its rows it is 128 rows, 32 columns side by side.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bits.h"
#include "loads.h"
#include "philox.h"
#include "rotate.h"
#include "rounding.h"

namespace {

constexpr int64_t kBlock = 16, kBlocks = 8, kSpan = kBlock * kBlocks, kWidth = 32, kSpare = 136;

struct Eden {
  const BlockPlan* plan;
  const CastPlan* corrected;  // of the scales, once they are corrected
  const RandomPlan* random;
  void* out;
  int type;
  int64_t rows, columns;
  float divisor;
  bool is_divided;
};

inline float element(const CastPlan& p, float y) { return saturated(rounded<kFixed>(p, y, 0), p.min, p.max) + p.zero; }

inline float correction(float of_x, float of_q) { return of_q == 0.0f ? 1.0f : of_x / of_q; }

template <Chance C>
inline float corrected_scale(const CastPlan& p, float scale, uint32_t word) {
  return saturated(rounded<C>(p, scale, word), p.min, p.max);
}

template <class In, Chance C>
int cast_rows(const Eden& e, const typename In::Storage* x, int64_t begin, int64_t end) {
  const CastPlan p = e.plan->element;
  const int64_t blocks = (e.columns + kBlock - 1) / kBlock;
  std::vector<uint32_t> buffer(C == kFixed ? 0 : size_t(blocks) + 2 * kSpare);
  int said = 0;
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* words = nullptr;
    if (C != kFixed) {
      const int64_t start = e.random->offset + row * blocks, first = start / 4;
      philox(*e.random, first, (start + blocks + 3) / 4 - first, buffer.data());
      words = buffer.data() + start % 4;
    }
    for (int64_t column = 0; column < e.columns; column += kSpan) {
      const int64_t at = row * e.columns + column, count = std::min(kSpan, e.columns - column);
      const int64_t num = (count + kBlock - 1) / kBlock;
      alignas(64) float values[kSpan] = {}, q[kSpan];
      for (int64_t i = 0; i < count; ++i) values[i] = In::load(x[at + i]);
      BlockScales<kBlocks> s = {};
      for (int64_t b = 0; b < num; ++b) s.amax[b] = block_amax<Fp32>(values + b * kBlock, kBlock);
      said |= scale_blocks(*e.plan, s, num, e.divisor, e.plan->per_max);
      float of_x[kBlocks] = {}, of_q[kBlocks] = {};
      for (int64_t b = 0; b < num; ++b) {
        alignas(64) float xx[kBlock], xq[kBlock];
        const float factor = s.factor[b];
        const float* v = values + b * kBlock;
        float* to = q + b * kBlock;
#pragma omp simd
        for (int k = 0; k < kBlock; ++k) {
          const float y = v[k] * factor;
          to[k] = element(p, y);
          xx[k] = y * y;
          xq[k] = y * to[k];
        }
        for (int half = 8; half; half /= 2)
          for (int k = 0; k < half; ++k) xx[k] += xx[k + half], xq[k] += xq[k + half];
        const float weight = s.scale[b] * s.scale[b];
        of_x[b] = xx[0] * weight;
        of_q[b] = xq[0] * weight;
      }
      for (int half = 4; half; half /= 2)
        for (int b = 0; b < half; ++b) of_x[b] += of_x[b + half], of_q[b] += of_q[b + half];
      const float by = correction(of_x[0], of_q[0]);
      for (int64_t b = 0; b < num; ++b) {
        const float scale = corrected_scale<C>(*e.corrected, s.scale[b] * by, C == kFixed ? 0 : words[column / kBlock + b]);
#pragma omp simd
        for (int k = 0; k < kBlock; ++k) q[b * kBlock + k] *= scale;
      }
      if (e.is_divided)
        for (int64_t i = 0; i < count; ++i) q[i] /= e.divisor;
      if (e.type == kFp32)
        std::memcpy(static_cast<float*>(e.out) + at, q, size_t(count) * 4);
      else
        narrow(q, e.out, at, count, e.type);
    }
  }
  return said;
}

// Spans [begin, end) of 128 rows, matrix by matrix.
template <class In, Chance C>
int cast_bands(const Eden& e, const typename In::Storage* x, int64_t begin, int64_t end) {
  const CastPlan p = e.plan->element;
  const int64_t bands = (e.rows + kSpan - 1) / kSpan, blocks = (e.rows + kBlock - 1) / kBlock;
  std::vector<float> q(kSpan * kWidth), xx(kBlock * kWidth), xq(kBlock * kWidth);
  uint32_t buffer[2 * kSpare], words[kBlocks][kWidth] = {};
  int said = 0;
  for (int64_t band = begin; band < end; ++band) {
    const int64_t matrix = band / bands, row = band % bands * kSpan, height = std::min(kSpan, e.rows - row);
    const int64_t num = (height + kBlock - 1) / kBlock;
    for (int64_t column = 0; column < e.columns; column += kWidth) {
      const int64_t width = std::min(kWidth, e.columns - column), at = (matrix * e.rows + row) * e.columns + column;
      BlockScales<kWidth> s[kBlocks];
      float of_x[kBlocks][kWidth] = {}, of_q[kBlocks][kWidth] = {};
      for (int64_t b = 0; b < num; ++b) {
        const int64_t tall = std::min(kBlock, height - b * kBlock);
        const auto* from = x + at + b * kBlock * e.columns;
        column_amax<In>(from, tall, e.columns, width, s[b].amax);
        said |= scale_blocks(*e.plan, s[b], width, e.divisor, e.plan->per_max);
        for (int64_t i = 0; i < tall; ++i) {
          const typename In::Storage* __restrict line = from + i * e.columns;
          float* __restrict to = q.data() + (b * kBlock + i) * kWidth;
          float *__restrict sx = xx.data() + i * kWidth, *__restrict sq = xq.data() + i * kWidth;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) {
            const float y = In::load(line[j]) * s[b].factor[j];
            const float rounded_y = element(p, y);
            to[j] = rounded_y;
            sx[j] = y * y;
            sq[j] = y * rounded_y;
          }
        }
        std::fill(xx.begin() + tall * kWidth, xx.end(), 0.0f);
        std::fill(xq.begin() + tall * kWidth, xq.end(), 0.0f);
        for (int64_t half = 8; half; half /= 2)
#pragma omp simd
          for (int64_t j = 0; j < half * kWidth; ++j) xx[j] += xx[j + half * kWidth], xq[j] += xq[j + half * kWidth];
        for (int64_t j = 0; j < width; ++j) {
          const float weight = s[b].scale[j] * s[b].scale[j];
          of_x[b][j] = xx[j] * weight;
          of_q[b][j] = xq[j] * weight;
        }
      }
      for (int half = 4; half; half /= 2)
        for (int b = 0; b < half; ++b)
          for (int64_t j = 0; j < width; ++j) of_x[b][j] += of_x[b + half][j], of_q[b][j] += of_q[b + half][j];
      if (C != kFixed)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t start = e.random->offset + (matrix * e.columns + column + j) * blocks + row / kBlock;
          philox(*e.random, start / 4, (start + num + 3) / 4 - start / 4, buffer);
          for (int64_t b = 0; b < num; ++b) words[b][j] = buffer[start % 4 + b];
        }
      for (int64_t b = 0; b < num; ++b)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j)
          s[b].scale[j] = corrected_scale<C>(*e.corrected, s[b].scale[j] * correction(of_x[0][j], of_q[0][j]), words[b][j]);
      for (int64_t i = 0; i < height; ++i) {
        float* __restrict to = q.data() + i * kWidth;
        const float* __restrict scale = s[i / kBlock].scale;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) to[j] *= scale[j];
        if (e.is_divided)
          for (int64_t j = 0; j < width; ++j) to[j] /= e.divisor;
        if (e.type == kFp32)
          std::memcpy(static_cast<float*>(e.out) + at + i * e.columns, to, size_t(width) * 4);
        else
          narrow(to, e.out, at + i * e.columns, width, e.type);
      }
    }
  }
  return said;
}

template <class In, Chance C>
int cast_all(const Eden& e, const void* x, int64_t matrices, bool is_column, const TurnPlan* turn, int threads) {
  const auto* typed = static_cast<const typename In::Storage*>(x);
  const int64_t count = is_column ? matrices * ((e.rows + kSpan - 1) / kSpan) : matrices * e.rows;
  int said = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : said)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = count * part / threads, end = count * (part + 1) / threads;
    if (turn) {
      const int64_t bands = (e.rows + kSpan - 1) / kSpan;
      turn_pieces<In>(*turn, typed, matrices, e.rows, e.columns, is_column, std::max<int64_t>(turn->size, kSpan), part, threads,
                      [&](const float* y, int64_t from, int64_t to) {
                        const int64_t band = from / e.rows * bands + from % e.rows / kSpan;
                        said |= is_column ? cast_bands<Fp32, C>(e, y, band, band + 1) : cast_rows<Fp32, C>(e, y, from, to);
                      });
      continue;
    }
    said |= is_column ? cast_bands<In, C>(e, typed, begin, end) : cast_rows<In, C>(e, typed, begin, end);
  }
  return said;
}

template <class In>
int cast_all(const Eden& e, const void* x, int64_t matrices, bool is_column, const TurnPlan* turn, int threads) {
  return e.random ? cast_all<In, kSingle>(e, x, matrices, is_column, turn, threads)
                  : cast_all<In, kFixed>(e, x, matrices, is_column, turn, threads);
}

}  // namespace

extern "C" {

// As lp_cast_blocks of cast.cpp. corrected: how the corrected scales are rounded, with `random` unless that is null; its low
// half has a spacing with an inverse, as e4m3's has.
int lp_cast_eden(const BlockPlan* plan, const CastPlan* corrected, const void* x, int dtype, void* out, int type, int64_t matrices,
                 int64_t rows, int64_t columns, int is_column, float divisor, int is_divided, const RandomPlan* random,
                 const TurnPlan* turn, int threads) {
  Eden e = {plan, corrected, random, out, type, rows, columns, divisor, is_divided != 0};
  const auto cast = dtype == 0 ? cast_all<Fp32> : dtype == 1 ? cast_all<Bf16> : cast_all<Fp16>;
  if (!is_column) e.rows = rows * matrices, matrices = 1;
  return cast(e, x, matrices, is_column, turn, threads);
}

}  // extern "C"
