// Packing: grid values as the bits of their codes, and back, in one pass over memory; the layout of the bytes and the
// rule by which a block is told from its values are those of runtime/numerics/packing.py. Plain C++17, called through
// ctypes by packing.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codes.h"
#include "huge_pages.h"

namespace {

constexpr int64_t kPart = 4096;  // elements that stay in the first-level cache, a multiple of 8
constexpr int64_t kLanes = 64;   // blocks that are looked at side by side

enum Said { kLostNan = 1, kInfinite = 2, kUntold = 4 };

// How the values of blocks are made; mirrors BlockPacking of packing.py.
struct BlockPacking {
  int64_t size;           // elements of a block
  int32_t is_down;        // blocks lie down the columns
  int32_t is_two_level;   // the scale is a float of its own, else 2^(code - 127)
  float unit, largest;    // what an element of 1 stands for, the largest element in units of the scale
  float scale_max;
};

// dtype: 0 fp32, 1 bf16.
inline void load(const void* from, int dtype, int64_t at, float* out, int64_t count) {
  if (dtype == 0) {
    std::memcpy(out, static_cast<const float*>(from) + at, size_t(count) * 4);
    return;
  }
  const uint16_t* const values = static_cast<const uint16_t*>(from) + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = float_of(uint32_t(values[i]) << 16);
}

inline void store(void* to, int dtype, int64_t at, const float* values, int64_t count) {
  if (dtype == 0) {
    std::memcpy(static_cast<float*>(to) + at, values, size_t(count) * 4);
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(to) + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = uint16_t(bits_of(values[i]) >> 16);  // exact: the values are of bf16
}

inline void put_infinities(const CodePlan& plan, const float* values, uint8_t* codes, int64_t count) {
  if (plan.kind || plan.infinity == 0xffffffffu) return;
  const uint32_t infinity = plan.infinity, top = uint32_t(plan.bits - 1);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i]);
    codes[i] = (bits & 0x7fffffffu) == 0x7f800000u ? uint8_t(infinity | (bits >> 31) << top) : codes[i];
  }
}

inline void put_infinities(const CodePlan& plan, const float* values, int32_t* codes, int64_t count) {
  if (plan.kind || plan.infinity == 0xffffffffu) return;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i]);
    if ((bits & 0x7fffffffu) == 0x7f800000u) codes[i] = int32_t(plan.infinity | (bits >> 31) << (plan.bits - 1));
  }
}

// Codes, a byte each, to `bits` each; `count` a multiple of 8 but at the end of all.
inline void to_bits(const uint8_t* codes, uint8_t* out, int64_t count, int bits) {
  if (bits == 8) {
    std::memcpy(out, codes, size_t(count));
    return;
  }
  if (bits == 4) {
    const int64_t pairs = count / 2;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) out[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
    if (count & 1) out[pairs] = codes[count - 1];
    return;
  }
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t lanes = std::min<int64_t>(8, count - first);
    uint64_t word = 0;
    for (int64_t i = 0; i < lanes; ++i) word |= uint64_t(codes[first + i]) << (i * bits);
    std::memcpy(out + first / 8 * bits, &word, size_t((lanes * bits + 7) / 8));
  }
}

inline void from_bits(const uint8_t* from, uint8_t* codes, int64_t count, int bits) {
  if (bits == 8) {
    std::memcpy(codes, from, size_t(count));
    return;
  }
  if (bits == 4) {
    const int64_t pairs = count / 2;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      codes[2 * i] = from[i] & 15;
      codes[2 * i + 1] = from[i] >> 4;
    }
    if (count & 1) codes[count - 1] = from[pairs] & 15;
    return;
  }
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t lanes = std::min<int64_t>(8, count - first);
    uint64_t word = 0;
    std::memcpy(&word, from + first / 8 * bits, size_t((lanes * bits + 7) / 8));
    for (int64_t i = 0; i < lanes; ++i) codes[first + i] = uint8_t(word >> (i * bits) & mask);
  }
}

// 2^k as fp32, of -149 <= k <= 127.
inline float two_to(int k) { return k >= -126 ? float_of(uint32_t(k + 127) << 23) : float_of(1u << (k + 149)); }

inline float least_shared(float amax, float largest) {
  int exponent;
  std::frexp(double(amax) / largest, &exponent);
  if (double(amax) <= std::ldexp(double(largest), exponent - 1)) --exponent;
  return float(exponent);
}

constexpr float kMagnitudes[7] = {6, 4, 3, 2, 1.5f, 1, 0.5f};  // of e2m1

// The scale of one block of two levels, from its values (a stride apart); 0 if no scale gives them.
float told_scale(const CodePlan& element, const CodePlan& scales, float scale_max, const float* values, int64_t stride,
                 int64_t size, float amax) {
  for (const float magnitude : kMagnitudes) {
    float scale = amax / magnitude, back;
    if (scale > scale_max) continue;
    uint8_t code;
    encode_run(scales, &scale, &code, 1);
    decode_run<uint8_t, int32_t>(scales, &code, &back, 1);
    if (back != scale || scale == 0 || scale * magnitude != amax) continue;
    bool fits = true;
    for (int64_t i = 0; i < size && fits; ++i) {
      const float e = std::fabs(values[i * stride] / scale);
      fits = e == 0 || std::find(kMagnitudes, kMagnitudes + 7, e) != kMagnitudes + 7;
    }
    if (fits) return scale;
  }
  return 0;
}

// Codes [size][lanes] and scale codes [lanes] of blocks side by side, values [size][kLanes]. Returns what there is to say.
int pack_tile(const CodePlan& element, const CodePlan& scales, const BlockPacking& how, const float* values, int64_t size,
              int64_t lanes, uint8_t* codes, uint8_t* scale_codes) {
  int said = 0;
  float amax[kLanes], scale[kLanes];
  bool is_nan[kLanes];
  uint32_t top[kLanes] = {};
  for (int64_t r = 0; r < size; ++r) {
    const float* const row = values + r * kLanes;
#pragma omp simd
    for (int64_t w = 0; w < kLanes; ++w) {
      const uint32_t m = bits_of(row[w]) & 0x7fffffffu;
      top[w] = m > top[w] ? m : top[w];
    }
  }
  for (int64_t w = 0; w < kLanes; ++w) {
    is_nan[w] = top[w] > 0x7f800000u;
    if (top[w] == 0x7f800000u) said |= kInfinite;
    amax[w] = is_nan[w] ? 0.0f : float_of(top[w]);
  }
  if (said & kInfinite) return said;
  float q[kLanes];
  if (!how.is_two_level) {
    float first[kLanes], second[kLanes];  // 1 / (scale unit), in two steps: 2^-127 and 2^127 are not both inverses in fp32
    for (int64_t w = 0; w < lanes; ++w) {
      int k = amax[w] > 0 ? int(least_shared(amax[w], how.largest)) : -127;
      k = std::min(127, std::max(-127, k));
      scale_codes[w] = is_nan[w] ? 255 : uint8_t(k + 127);
      first[w] = two_to(-(k / 2)), second[w] = two_to(-(k - k / 2)) / how.unit;
    }
    for (int64_t w = lanes; w < kLanes; ++w) first[w] = second[w] = 1;
    for (int64_t r = 0; r < size; ++r) {
      const float* const row = values + r * kLanes;
#pragma omp simd
      for (int64_t w = 0; w < kLanes; ++w) q[w] = row[w] * first[w] * second[w];
      for (int64_t w = 0; w < lanes; ++w) q[w] = is_nan[w] ? 0.0f : q[w];
      encode_run(element, q, codes + r * kLanes, kLanes);
    }
    return said;
  }
  uint8_t guess[kLanes];
  float back[kLanes];
  bool is_open[kLanes];
#pragma omp simd
  for (int64_t w = 0; w < kLanes; ++w) scale[w] = amax[w] > 0 ? amax[w] / kMagnitudes[0] : 1.0f;
  for (int64_t w = 0; w < kLanes; ++w) scale[w] = std::min(scale[w], how.scale_max);
  encode_run(scales, scale, guess, kLanes);
  decode_run<uint8_t, int32_t>(scales, guess, back, kLanes);
  for (int64_t w = 0; w < kLanes; ++w) {
    is_open[w] = back[w] != scale[w] || scale[w] == 0;
    if (is_open[w]) scale[w] = 1;
  }
  const auto encode = [&](int32_t* open) {
    for (int64_t r = 0; r < size; ++r) {
      const float* const row = values + r * kLanes;
#pragma omp simd
      for (int64_t w = 0; w < kLanes; ++w) q[w] = row[w] / scale[w];
      for (int64_t w = 0; w < kLanes; ++w) q[w] = is_nan[w] ? 0.0f : q[w];
      uint8_t* const out = codes + r * kLanes;
      encode_run(element, q, out, kLanes);
      for (int64_t w = 0; w < kLanes; ++w) out[w] &= 15;  // what is no element is looked at again
      decode_run<uint8_t, int32_t>(element, out, back, kLanes);
#pragma omp simd
      for (int64_t w = 0; w < kLanes; ++w) open[w] |= back[w] != q[w];
    }
  };
  int32_t open[kLanes] = {};
  encode(open);
  bool is_any = false;
  for (int64_t w = 0; w < lanes; ++w) {
    if (!(is_open[w] || open[w]) || is_nan[w]) continue;
    scale[w] = told_scale(element, scales, how.scale_max, values + w, kLanes, size, amax[w]);
    if (scale[w] == 0) {
      scale[w] = 1;
      said |= kUntold;
    }
    is_any = true;
  }
  if (is_any) {
    std::fill(open, open + kLanes, 0);
    encode(open);
  }
  encode_run(scales, scale, guess, kLanes);
  for (int64_t w = 0; w < lanes; ++w) scale_codes[w] = is_nan[w] ? 127 : guess[w];
  return said;
}

}  // namespace

extern "C" {

// The codes of `count` values of a scalar format. Returns kLostNan if a NaN has no code.
int lp_pack(const CodePlan* plan, const void* q, int dtype, int64_t count, uint8_t* out, int has_nan, int threads) {
  const int bits = plan->bits;
  const int64_t parts = (count + kPart - 1) / kPart;
  ask_for_huge_pages(out, bits > 8 ? 2 * count : count * bits / 8);
  int said = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : said)
  for (int64_t part = 0; part < parts; ++part) {
    alignas(64) float values[kPart];
    alignas(64) uint8_t codes[kPart];
    const int64_t at = part * kPart, size = std::min(kPart, count - at);
    load(q, dtype, at, values, size);
    if (!has_nan) {
      int32_t lost = 0;
#pragma omp simd reduction(| : lost)
      for (int64_t i = 0; i < size; ++i) lost |= (bits_of(values[i]) & 0x7fffffffu) > 0x7f800000u;
      if (lost) {
        said |= kLostNan;
        for (int64_t i = 0; i < size; ++i) values[i] = values[i] != values[i] ? 0.0f : values[i];
      }
    }
    if (bits > 8) {
      int32_t wide[kPart];
      encode_run(*plan, values, wide, size);
      put_infinities(*plan, values, wide, size);
      uint16_t* const to = reinterpret_cast<uint16_t*>(out) + at;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = uint16_t(wide[i]);
    } else {
      encode_run(*plan, values, codes, size);
      put_infinities(*plan, values, codes, size);
      to_bits(codes, out + at / 8 * bits, size, bits);
    }
  }
  return said;
}

void lp_unpack(const CodePlan* plan, const uint8_t* from, int64_t count, void* out, int dtype, int threads) {
  const int bits = plan->bits;
  const int64_t parts = (count + kPart - 1) / kPart;
  ask_for_huge_pages(out, count * (dtype ? 2 : 4));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    alignas(64) float values[kPart];
    alignas(64) uint8_t codes[kPart];
    const int64_t at = part * kPart, size = std::min(kPart, count - at);
    if (bits > 8) {
      int32_t wide[kPart];
      const uint16_t* const words = reinterpret_cast<const uint16_t*>(from) + at;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) wide[i] = int32_t(words[i]);
      decode_run<int32_t, int32_t>(*plan, wide, values, size);
    } else {
      const uint8_t* narrow = from + at;
      if (bits != 8) {
        from_bits(from + at / 8 * bits, codes, size, bits);
        narrow = codes;
      }
      decode_run<uint8_t, int32_t>(*plan, narrow, values, size);
    }
    store(out, dtype, at, values, size);
  }
}

// Codes of `matrices` times [rows, columns] values of a block format, code_bytes a matrix, and behind all of them the
// codes of the scales. Returns kInfinite or kUntold where the values are none that a block makes in fp32; then the
// buffer is not to be read.
int lp_pack_blocks(const CodePlan* element, const CodePlan* scales, const BlockPacking* how, const void* q, int dtype,
                   int64_t matrices, int64_t rows, int64_t columns, int64_t code_bytes, uint8_t* out, int threads) {
  const int64_t size = how->size, band = how->is_down ? size : 8, bands = (rows + band - 1) / band;
  const int64_t across = how->is_down ? columns : (columns + size - 1) / size, down = how->is_down ? bands : rows;
  uint8_t* const scale_codes = out + matrices * code_bytes;
  int said = 0;
#pragma omp parallel num_threads(threads) reduction(| : said)
  {
    std::vector<uint8_t> codes(size_t(band * columns + kLanes));
    std::vector<float> values(size_t(size * kLanes)), line(size_t(std::max(columns, kLanes)));
    std::vector<uint8_t> tile(size_t(size * kLanes));
    uint8_t tile_scales[kLanes];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < matrices * bands; ++item) {
      const int64_t matrix = item / bands, top = item % bands * band, height = std::min(band, rows - top);
      uint8_t* const scale_at = scale_codes + matrix * down * across;
      if (how->is_down) {
        for (int64_t left = 0; left < columns; left += kLanes) {
          const int64_t lanes = std::min(kLanes, columns - left);
          std::fill(values.begin(), values.end(), 0.0f);
          for (int64_t r = 0; r < height; ++r)
            load(q, dtype, (matrix * rows + top + r) * columns + left, values.data() + r * kLanes, lanes);
          said |= pack_tile(*element, *scales, *how, values.data(), height, lanes, tile.data(), tile_scales);
          for (int64_t r = 0; r < height; ++r)
            std::memcpy(codes.data() + r * columns + left, tile.data() + r * kLanes, size_t(lanes));
          std::memcpy(scale_at + top / band * columns + left, tile_scales, size_t(lanes));
        }
      } else {
        for (int64_t r = 0; r < height; ++r) {
          load(q, dtype, (matrix * rows + top + r) * columns, line.data(), columns);
          for (int64_t left = 0; left < across; left += kLanes) {
            const int64_t lanes = std::min(kLanes, across - left);
            std::fill(values.begin(), values.end(), 0.0f);
            for (int64_t w = 0; w < lanes; ++w) {
              const int64_t first = (left + w) * size, end = std::min(size, columns - first);
              for (int64_t i = 0; i < end; ++i) values[size_t(i * kLanes + w)] = line[size_t(first + i)];
            }
            said |= pack_tile(*element, *scales, *how, values.data(), size, lanes, tile.data(), tile_scales);
            for (int64_t w = 0; w < lanes; ++w) {
              const int64_t first = (left + w) * size, end = std::min(size, columns - first);
              for (int64_t i = 0; i < end; ++i) codes[size_t(r * columns + first + i)] = tile[size_t(i * kLanes + w)];
            }
            std::memcpy(scale_at + (top + r) * across + left, tile_scales, size_t(lanes));
          }
        }
      }
      to_bits(codes.data(), out + matrix * code_bytes + top * columns * element->bits / 8, height * columns, element->bits);
    }
  }
  return said;
}

void lp_unpack_blocks(const CodePlan* element, const CodePlan* scales, const BlockPacking* how, const uint8_t* from,
                      int64_t matrices, int64_t rows, int64_t columns, int64_t code_bytes, void* out, int dtype, int threads) {
  const int64_t size = how->size, band = how->is_down ? size : 8, bands = (rows + band - 1) / band;
  const int64_t across = how->is_down ? columns : (columns + size - 1) / size, down = how->is_down ? bands : rows;
  const uint8_t* const scale_codes = from + matrices * code_bytes;
  const float unit = how->unit;
  ask_for_huge_pages(out, matrices * rows * columns * (dtype ? 2 : 4));
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> codes(size_t(band * columns));
    std::vector<float> values(static_cast<size_t>(columns)), factors(static_cast<size_t>(across));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < matrices * bands; ++item) {
      const int64_t matrix = item / bands, top = item % bands * band, height = std::min(band, rows - top);
      const uint8_t* const scale_at = scale_codes + matrix * down * across;
      from_bits(from + matrix * code_bytes + top * columns * element->bits / 8, codes.data(), height * columns, element->bits);
      for (int64_t r = 0; r < height; ++r) {
        if (!how->is_down || r == 0)
          decode_run<uint8_t, int32_t>(*scales, scale_at + (how->is_down ? top / band : top + r) * across, factors.data(), across);
        float* const v = values.data();
        decode_run<uint8_t, int32_t>(*element, codes.data() + r * columns, v, columns);
        if (how->is_down) {
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) v[i] = v[i] * unit * factors[i];
        } else {
          for (int64_t block = 0; block < across; ++block) {
            const float factor = factors[size_t(block)];
            const int64_t end = std::min(columns, (block + 1) * size);
#pragma omp simd
            for (int64_t i = block * size; i < end; ++i) v[i] = v[i] * unit * factor;
          }
        }
        store(out, dtype, (matrix * rows + top + r) * columns, v, columns);
      }
    }
  }
}
}
