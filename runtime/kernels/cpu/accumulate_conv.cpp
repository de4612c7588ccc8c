// Accumulate, convolutions: the sums of accumulate.cpp, read from a padded image. Groups and kernel positions ("taps") are loops
// here. Bit for bit the sums over the matrices of runtime/ops/im2col.py, by the same parts of accumulate_tile.h.
//
//   lp_accumulate_conv    y[b, g N + n, out[p]] = sum over k = (c, t) of x[b, g C + c, lane[p] + tap[t]] w[g, c, number[t], n]
//   lp_accumulate_taps    dw[g N + n, c, t]     = sum over k = (b, p) of dy[b, g N + n, p] x[b, g C + c, lane[p] + tap[t]]
//   lp_accumulate_depth   the same for C = N = 1, from images whose channels lie side by side
//
// A product with zeros in between (stride) may be left out by the caller, and number[t] says where in the sum a tap stands: chunks
// are of c R + number[t]. Vectors are 16 positions (of dw: 16 pairs of channel and tap); few outputs of a group take more vectors,
// so that there are always eight chains of roundings or more. The largest and the smallest value are those of the whole tensors.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "accumulate_tile.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

namespace {

constexpr int kMostVectors = 8, kMostTaps = 9;
constexpr int64_t kBlockFloats = 1 << 13;

// Mirrors Conv of accumulate_conv.py. Strides in elements.
struct Conv {
  int64_t batch, groups, channels, outputs;        // C and N of a group
  int64_t positions, taps, all_taps, chunk;        // P, taps that are here, R
  int64_t x_batch, x_channel, x_size;
  int64_t w_group, w_channel, w_tap, w_output;     // of dw: none
  int64_t y_batch, y_channel;                      // of dw: those of dy
  int64_t threads;
};

Range range_of(const float* x, int64_t count, int threads) {
  __m512i top = _mm512_setzero_si512(), bottom = _mm512_set1_epi32(0x7f7ffffe);
  const int64_t piece = 1 << 14, pieces = (count + piece - 1) / piece;
#pragma omp parallel num_threads(threads)
  {
    Seen seen;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i)
      for (int64_t j = i * piece; j < std::min(count, (i + 1) * piece); j += 16)
        seen.add(_mm512_maskz_loadu_ps(count - j < 16 ? __mmask16((1u << (count - j)) - 1) : __mmask16(0xffff), x + j));
#pragma omp critical
    {
      top = _mm512_max_epu32(top, seen.top);
      bottom = _mm512_min_epu32(bottom, seen.bottom);
    }
  }
  Seen all;
  all.top = top, all.bottom = bottom;
  return all.range();
}

Path path_of(const How& how, const CastPlan& p, Range a, Range b, int64_t k, int64_t chunk) {
  const bool has_room = double(a.top) * b.top < room(p, how, k, chunk);  // false for NaN
  const double smallest = quantum_of(a.bottom, how.a_bits) * quantum_of(b.bottom, how.b_bits);
  return path_of(how, p, has_room, has_room && std::max(smallest, how.smallest_product) >= how.least_sum);
}

// Sixteen places of memory, as runs of neighbours; many runs are gathered one by one.
struct Places {
  static constexpr int kMost = 4;
  int count = 0;
  __mmask16 mask[kMost], valid = 0;
  int32_t first[kMost];
  alignas(64) int32_t at[16];

  Places() = default;
  Places(const int32_t* from, int num) {
    for (int i = 0; i < 16; ++i) at[i] = i < num ? from[i] : 0;
    valid = num < 16 ? __mmask16((1u << num) - 1) : __mmask16(0xffff);
    for (int i = 0; i < num; ++i) {
      const bool is_next = i && at[i] == at[i - 1] + 1;
      if (!is_next && count == kMost) {
        count = kMost + 1;
        return;
      }
      if (!is_next) {
        first[count] = at[i] - i;
        mask[count++] = 0;
      }
      mask[count - 1] |= __mmask16(1u << i);
    }
  }
  __m512 load(const float* x) const {
    if (count > kMost) return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, _mm512_load_si512(at), x, 4);
    __m512 v = _mm512_setzero_ps();
    for (int i = 0; i < count; ++i) v = _mm512_mask_loadu_ps(v, mask[i], x + first[i]);
    return v;
  }
  void store(float* y, __m512 v) const {
    if (count > kMost)
      _mm512_mask_i32scatter_ps(y, valid, _mm512_load_si512(at), v, 4);
    else
      for (int i = 0; i < count; ++i) _mm512_mask_storeu_ps(y + first[i], mask[i], v);
  }
};

using Run = void (*)(const float*, const float*, int64_t, const CastPlan&, __m512*);
using Close = void (*)(int, bool, const CastPlan&, __m512*, __m512*);

// How many rows and vectors of a tile, for so many outputs of a group, and its loops.
struct Shape {
  int rows, vectors;
  Run run;
  Close close;
};

struct ShapeOf {
  int64_t outputs;
  template <Path path>
  Shape operator()() const {
    if (outputs == 1) return {1, 8, run<path, false, 1, 8>, close<path>};
    if (outputs == 2) return {2, 4, run<path, false, 2, 4>, close<path>};
    if (outputs == 3) return {3, 4, run<path, false, 3, 4>, close<path>};
    if (outputs == 4) return {4, 4, run<path, false, 4, 4>, close<path>};
    return {8, 2, run<path, false, 8, 2>, close<path>};
  }
};

// The sums of a tile: parts and totals of each panel of rows, kept while blocks of k pass by.
class Sums {
 public:
  Sums(const Shape& shape, int64_t panels, bool is_one_chunk, const CastPlan& p)
      : shape_(shape), count_(shape.rows * shape.vectors), is_one_chunk_(is_one_chunk), p_(p), lanes_(size_t(panels * 2 * count_)) {}
  void clear() { std::fill(lanes_.begin(), lanes_.end(), Lane{_mm512_setzero_ps()}); }
  // Products from ... to of a block; chunk_of[k] says to which chunk each belongs, is_last whether nothing follows.
  void add(int64_t panel, const float* a, const float* b, const int32_t* chunk_of, int64_t num_k, bool is_last) {
    __m512* parts = &lanes_[size_t(panel * 2 * count_)].v;
    for (int64_t k = 0; k < num_k;) {
      int64_t end = k + 1;
      while (end < num_k && chunk_of[end] == chunk_of[k]) ++end;
      shape_.run(a + k * kRows, b + k * shape_.vectors * 16, end - k, p_, parts);
      if (end == num_k ? is_last || chunk_of[end] != chunk_of[k] : true) shape_.close(count_, is_one_chunk_, p_, parts, parts + count_);
      k = end;
    }
  }
  __m512 total(int64_t panel, int row, int vector) const {
    return lanes_[size_t((panel * 2 + 1) * count_ + row * shape_.vectors + vector)].v;
  }

 private:
  struct alignas(64) Lane {
    __m512 v;
  };
  const Shape shape_;
  const int count_;
  const bool is_one_chunk_;
  const CastPlan& p_;
  std::vector<Lane> lanes_;
};

}  // namespace

extern "C" {

int lp_accumulate_conv_is_supported() { return 1; }

void lp_accumulate_conv(const CastPlan* plan, const How* how, const Conv* conv, const float* x, const int32_t* lane, const int32_t* tap,
                        const int32_t* number, const float* w, float* y, const int32_t* out) {
  const Conv& g = *conv;
  const int64_t num_k = g.channels * g.taps, all_k = g.channels * g.all_taps, chunk = g.chunk, panels = (g.outputs + kRows - 1) / kRows;
  std::vector<float> packed(size_t(g.groups * panels * num_k * kRows) + 16);
  std::vector<int32_t> chunk_of(size_t(num_k) + 1, -1);
  Seen seen;
  for (int64_t i = 0; i < g.groups; ++i)
    for (int64_t c = 0; c < g.channels; ++c)
      for (int64_t t = 0; t < g.taps; ++t)
        for (int64_t n = 0; n < g.outputs; ++n)
          packed[size_t(((i * panels + n / kRows) * num_k + c * g.taps + t) * kRows + n % kRows)] =
              w[i * g.w_group + c * g.w_channel + number[t] * g.w_tap + n * g.w_output];
  for (size_t i = 0; i + 16 <= packed.size(); i += 16) seen.add(_mm512_loadu_ps(&packed[i]));
  for (int64_t k = 0; k < num_k; ++k) chunk_of[size_t(k)] = int32_t((k / g.taps * g.all_taps + number[k % g.taps]) / chunk);
  const Path path = path_of(*how, *plan, seen.range(), range_of(x, g.x_size, int(g.threads)), all_k, chunk);
  const Shape shape = on_path(path, ShapeOf{g.outputs});
  const int64_t width = shape.vectors * 16, lanes = g.batch * g.positions, tiles = (lanes + width - 1) / width;
  const int64_t block = std::max<int64_t>(1, kBlockFloats / width), split = g.groups > 1 ? std::min<int64_t>(g.groups, 4) : 1;
#pragma omp parallel num_threads(g.threads)
  {
    std::vector<float> columns(size_t(std::min(block, num_k) * width) + 16);
    Sums sums(shape, panels, all_k <= chunk, *plan);
    Places from[kMostVectors], to[kMostVectors];
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tiles * split; ++task) {
      const int64_t first = task / split * width, valid = std::min(width, lanes - first);
      for (int v = 0; v < shape.vectors; ++v) {
        int32_t at[16], into[16];
        const int num = int(std::max<int64_t>(0, std::min<int64_t>(16, valid - v * 16)));
        for (int i = 0; i < num; ++i) {
          const int64_t q = first + v * 16 + i, b = q / g.positions, p = q % g.positions;
          at[i] = int32_t(b * g.x_batch + lane[p]), into[i] = int32_t(b * g.y_batch + out[p]);
        }
        from[v] = Places(at, num), to[v] = Places(into, num);
      }
      for (int64_t group = task % split; group < g.groups; group += split) {
        sums.clear();
        for (int64_t start = 0; start < num_k; start += block) {
          const int64_t size = std::min(block, num_k - start);
          for (int64_t k = start; k < start + size; ++k) {
            const float* image = x + (group * g.channels + k / g.taps) * g.x_channel + tap[k % g.taps];
            for (int v = 0; v < shape.vectors; ++v) _mm512_storeu_ps(&columns[size_t((k - start) * width + v * 16)], from[v].load(image));
          }
          for (int64_t panel = 0; panel < panels; ++panel)
            sums.add(panel, &packed[size_t(((group * panels + panel) * num_k + start) * kRows)], columns.data(), &chunk_of[size_t(start)], size,
                     start + size == num_k);
        }
        for (int64_t n = 0; n < g.outputs; ++n)
          for (int v = 0; v < shape.vectors; ++v)
            to[v].store(y + (group * g.outputs + n) * g.y_channel, sums.total(n / kRows, int(n % kRows), v));
      }
    }
  }
}

void lp_accumulate_taps(const CastPlan* plan, const How* how, const Conv* conv, const float* x, const int32_t* lane, const int32_t* tap,
                        const float* dy, float* dw) {
  const Conv& g = *conv;
  const int64_t num_k = g.batch * g.positions, chunk = g.chunk, panels = (g.outputs + kRows - 1) / kRows, pairs = g.channels * g.taps;
  std::vector<float> packed(size_t(g.groups * panels * num_k * kRows) + 16);
  std::vector<int32_t> chunk_of(size_t(num_k) + 1, -1), at(size_t(num_k) + 16);
  for (int64_t k = 0; k < num_k; ++k) {
    chunk_of[size_t(k)] = int32_t(k / chunk);
    at[size_t(k)] = int32_t(k / g.positions * g.x_batch + lane[k % g.positions]);
  }
#pragma omp parallel for collapse(2) schedule(static) num_threads(g.threads)
  for (int64_t i = 0; i < g.groups * panels; ++i)
    for (int64_t b = 0; b < g.batch; ++b) {
      const int64_t row = i % panels * kRows;
      pack(dy + b * g.y_batch + (i / panels * g.outputs + row) * g.y_channel, g.y_channel, 1, kRows, std::min<int64_t>(kRows, g.outputs - row),
           g.positions, &packed[size_t((i * num_k + b * g.positions) * kRows)]);
    }
  const Range of_dy = range_of(packed.data(), int64_t(packed.size()), int(g.threads));
  const Path path = path_of(*how, *plan, of_dy, range_of(x, g.x_size, int(g.threads)), num_k, chunk);
  const Shape shape = on_path(path, ShapeOf{g.outputs});
  const int64_t width = shape.vectors * 16, tiles = (pairs + width - 1) / width, block = std::max<int64_t>(16, kBlockFloats / width);
  const int64_t most = 8, split = (panels + most - 1) / most;  // panels that share a block of columns
#pragma omp parallel num_threads(g.threads)
  {
    std::vector<float> columns(size_t(block * width) + 16);
    Sums sums(shape, std::min(panels, most), num_k <= chunk, *plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < g.groups * tiles * split; ++task) {
      const int64_t group = task / (tiles * split), tile = task / split % tiles, above = task % split * most;
      const int64_t first = tile * width, valid = std::min(width, pairs - first), here = std::min(most, panels - above);
      const float* image = x + group * g.channels * g.x_channel;
      std::vector<const float*> source(size_t(width), nullptr);
      for (int64_t i = 0; i < valid; ++i) source[size_t(i)] = image + (first + i) / g.taps * g.x_channel + tap[(first + i) % g.taps];
      sums.clear();
      for (int64_t start = 0; start < num_k; start += block) {
        const int64_t size = std::min(block, num_k - start);
        for (int64_t k = 0; k < size; k += 16) {  // 16 positions of 16 pairs, transposed
          const int num = int(std::min<int64_t>(16, size - k));
          const Places from(&at[size_t(start + k)], num);
          for (int v = 0; v < shape.vectors; ++v) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) {
              const float* each = source[size_t(v * 16 + i)];
              rows[i] = each ? _mm512_castps_si512(from.load(each)) : _mm512_setzero_si512();
            }
            transpose16(rows);
            for (int j = 0; j < num; ++j) _mm512_storeu_si512(&columns[size_t((k + j) * width + v * 16)], rows[j]);
          }
        }
        for (int64_t panel = 0; panel < here; ++panel)
          sums.add(panel, &packed[size_t(((group * panels + above + panel) * num_k + start) * kRows)], columns.data(),
                   &chunk_of[size_t(start)], size, start + size == num_k);
      }
      for (int64_t n = above * kRows; n < std::min(g.outputs, (above + here) * kRows); ++n)
        for (int v = 0; v < shape.vectors; ++v) {
          const int64_t left = std::min<int64_t>(16, valid - v * 16);
          if (left <= 0) continue;
          _mm512_mask_storeu_ps(dw + (group * g.outputs + n) * pairs + first + v * 16, __mmask16((1u << left) - 1),
                                sums.total(n / kRows - above, int(n % kRows), v));
        }
    }
  }
}

}  // extern "C"

namespace {

// Taps ... + Taps of 32 channels: x and dy with channels side by side, `stride` apart from position to position.
template <Path path, int Taps>
void run_depth(const float* x, const float* dy, const int32_t* at, int64_t from, int64_t to, const int32_t* tap, int64_t stride,
               __mmask16 left, __mmask16 right, const CastPlan& p, __m512* parts) {
  __m512 part[Taps][2];
#pragma GCC unroll 18
  for (int i = 0; i < Taps * 2; ++i) part[i / 2][i % 2] = parts[i];
  for (int64_t k = from; k < to; ++k) {
    const __m512 a[2] = {_mm512_maskz_loadu_ps(left, dy + k * stride), _mm512_maskz_loadu_ps(right, dy + k * stride + 16)};
#pragma GCC unroll 9
    for (int t = 0; t < Taps; ++t) {
      const float* image = x + (int64_t(at[k]) + tap[t]) * stride;
      part[t][0] = accumulate<path>(part[t][0], a[0], _mm512_maskz_loadu_ps(left, image), p);
      part[t][1] = accumulate<path>(part[t][1], a[1], _mm512_maskz_loadu_ps(right, image + 16), p);
    }
  }
#pragma GCC unroll 18
  for (int i = 0; i < Taps * 2; ++i) parts[i] = part[i / 2][i % 2];
}

using RunDepth = void (*)(const float*, const float*, const int32_t*, int64_t, int64_t, const int32_t*, int64_t, __mmask16, __mmask16,
                          const CastPlan&, __m512*);

struct DepthLoops {
  RunDepth run[kMostTaps];
  Close close;
};

struct DepthOf {
  template <Path path>
  DepthLoops operator()() const {
    return {{run_depth<path, 1>, run_depth<path, 2>, run_depth<path, 3>, run_depth<path, 4>, run_depth<path, 5>, run_depth<path, 6>,
             run_depth<path, 7>, run_depth<path, 8>, run_depth<path, 9>},
            close<path>};
  }
};

}  // namespace

extern "C" {

// x: (B, positions of the padded image, G), dy: (B, P, G); offsets count positions. dw: (G, taps).
void lp_accumulate_depth(const CastPlan* plan, const How* how, const Conv* conv, const float* x, const int32_t* lane, const int32_t* tap,
                         const float* dy, float* dw) {
  const Conv& g = *conv;
  const int64_t num_k = g.batch * g.positions, chunk = g.chunk, stride = g.groups;
  std::vector<int32_t> at(size_t(num_k) + 1);
  for (int64_t k = 0; k < num_k; ++k) at[size_t(k)] = int32_t(k / g.positions * g.x_batch + lane[k % g.positions]);
  const Range of_dy = range_of(dy, num_k * stride, int(g.threads));
  const Path path = path_of(*how, *plan, of_dy, range_of(x, g.x_size, int(g.threads)), num_k, chunk);
  const DepthLoops loops = on_path(path, DepthOf{});
  const int64_t columns = (g.groups + 31) / 32, parts_of = (g.taps + kMostTaps - 1) / kMostTaps;
#pragma omp parallel for schedule(dynamic, 1) num_threads(g.threads)
  for (int64_t task = 0; task < columns * parts_of; ++task) {
    const int64_t channel = task / parts_of * 32, piece = task % parts_of, left = g.groups - channel;
    const int64_t first = g.taps * piece / parts_of, count = g.taps * (piece + 1) / parts_of - first;
    const __mmask16 low = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    const __mmask16 high = left >= 32 ? __mmask16(0xffff) : left > 16 ? __mmask16((1u << (left - 16)) - 1) : __mmask16(0);
    __m512 parts[kMostTaps * 2], totals[kMostTaps * 2];
    for (int i = 0; i < kMostTaps * 2; ++i) parts[i] = totals[i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < num_k; start += chunk) {
      loops.run[count - 1](x + channel, dy + channel, at.data(), start, std::min(num_k, start + chunk), tap + first, stride, low, high, *plan,
                           parts);
      loops.close(int(count) * 2, num_k <= chunk, *plan, parts, totals);
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < std::min<int64_t>(32, left); ++i) {
        alignas(64) float lanes[16];
        _mm512_store_ps(lanes, totals[t * 2 + i / 16]);
        dw[(channel + i) * g.taps + first + t] = lanes[i % 16];
      }
  }
}

}  // extern "C"

#else

extern "C" int lp_accumulate_conv_is_supported() { return 0; }

#endif
