// GEMM on tiles: C_MN = A_MK B_KN in fp32, where one instruction adds up to 64 products to each element of a 16 x 16 tile.
//
//   tdpbf16ps  operands that embed exactly in bf16, summed in fp32, (+ bias_N); as gemm.cpp, whose operands and meaning of
//              subnormals are these
//   tdpbssd    int8 operands, summed exactly in int32 while no sum reaches 2^31, then rounded once to fp32
//
// Both operands are packed once, into tiles of 1 KiB: 16 rows of A by 16 words along K, and 16 words along K by 16 columns
// of B; a word is two bf16 or four int8, and what is missing at the edges is zero. A task computes a block of C,
// 128 x 512, over all of K in chunks whose panels stay in L1 and L2. The order of additions depends on K alone, so the
// bits do not depend on threads or blocks.
//
// Plain C++17, no headers of torch; called through ctypes by runtime/kernels/cpu/gemm.py.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bf16_operand.h"

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__AVX512BW__) && defined(__AVX512BF16__)

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kTile = 16;                 // rows of a tile, and its columns in words
constexpr int64_t kWords = kTile * kTile;     // words of a tile
constexpr int64_t kBlock = 2 * kTile;         // of C that is kept in tiles: 2 x 2 of them
constexpr int64_t kChunk = 16;                // tiles along K of one chunk
constexpr int64_t kRowBlock = 4 * kBlock, kColumnBlock = 16 * kBlock;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline uint64_t first_lanes(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : count <= 0 ? 0 : (uint64_t(1) << count) - 1;
}

// The first `count` of 32 values at p, as 16 words; the rest zero.
inline __m512i words_along_k(const float* p, int64_t count) {
  if (count >= 32) return pairs(p);
  const uint64_t mask = first_lanes(count);
  float padded[32];
  _mm512_storeu_ps(padded, _mm512_maskz_loadu_ps(__mmask16(mask), p));
  _mm512_storeu_ps(padded + 16, _mm512_maskz_loadu_ps(__mmask16(mask >> 16), p + 16));
  return pairs(padded);
}

inline __m512i words_along_k(const uint16_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(__mmask32(first_lanes(count)), p);
}

inline __m512i words_along_k(const int8_t* p, int64_t count) { return _mm512_maskz_loadu_epi8(first_lanes(count), p); }

// The first `count` of 16 values at p, each in the low bits of a word.
inline __m512i spread(const float* p, int64_t count) {
  return _mm512_srli_epi32(_mm512_maskz_loadu_epi32(__mmask16(first_lanes(count)), p), 16);
}

inline __m512i spread(const uint16_t* p, int64_t count) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(first_lanes(count)), p));
}

inline __m512i spread(const int8_t* p, int64_t count) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16(first_lanes(count)), p));
}

// What the tiles hold and how they are multiplied: kPerWord values of K in a word; tiles 0 to 3 are the block of C, its
// upper half fed by tile 4 of A and its lower by tile 5, with tiles 6 and 7 of B.
struct Bf16 {
  static constexpr int64_t kPerWord = 2;
  static void upper() { _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); }
  static void lower() { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
};

struct Int8 {
  static constexpr int64_t kPerWord = 4;
  static void upper() { _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); }
  static void lower() { _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7); }
};

// One tile: outer indices first .. first + 15 by 16 words from k on. by_outer: rows are outer indices (A), else words (B).
template <typename Unit, bool by_outer, typename T>
inline void pack_tile(const T* data, int64_t outer, int64_t inner, int64_t first, int64_t num_outer, int64_t k,
                      int64_t num_k, uint32_t* out) {
  __m512i rows[16];
  const bool is_along_k = inner == 1;
  for (int64_t i = 0; i < kTile; ++i) {
    rows[i] = _mm512_setzero_si512();
    if (is_along_k) {
      if (first + i < num_outer) rows[i] = words_along_k(data + (first + i) * outer + k, num_k - k);
    } else {
      for (int64_t part = 0; part < Unit::kPerWord; ++part) {
        const int64_t at = k + Unit::kPerWord * i + part;
        if (at >= num_k) break;
        const __m512i values = spread(data + at * inner + first, num_outer - first);
        rows[i] = _mm512_or_epi32(rows[i], _mm512_slli_epi32(values, unsigned(32 / Unit::kPerWord * part)));
      }
    }
  }
  if (is_along_k != by_outer) transpose16(rows);
  for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(out + i * kTile, rows[i]);
}

// The tiles of 16 outer indices from `first` on, one after the other along K.
template <typename Unit, bool by_outer, typename T>
void pack_panel(const T* data, const Operand& x, int64_t first, int64_t num_outer, int64_t num_k, uint32_t* out) {
  for (int64_t k = 0; k < num_k; k += Unit::kPerWord * kTile, out += kWords) {
    if (first < num_outer)
      pack_tile<Unit, by_outer>(data, x.outer, x.inner, first, num_outer, k, num_k, out);
    else
      std::memset(out, 0, kWords * sizeof(uint32_t));
  }
}

template <typename Unit, bool by_outer>
void pack_panel(const Operand& x, int64_t first, int64_t num_outer, int64_t num_k, uint32_t* out) {
  if constexpr (std::is_same_v<Unit, Int8>)
    pack_panel<Unit, by_outer>(static_cast<const int8_t*>(x.data), x, first, num_outer, num_k, out);
  else if (x.dtype == 0)
    pack_panel<Unit, by_outer>(static_cast<const float*>(x.data), x, first, num_outer, num_k, out);
  else
    pack_panel<Unit, by_outer>(static_cast<const uint16_t*>(x.data), x, first, num_outer, num_k, out);
}

// c (32 x 32, rows `stride` bytes apart) += panels of A times panels of B over `count` tiles of k. start: the row of bias
// that c begins with where it is not read, or null for 0.
template <typename Unit>
inline void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t panel, int64_t count, float* c, int64_t stride,
                            bool is_read, const float* start) {
  float* const lower = reinterpret_cast<float*>(reinterpret_cast<char*>(c) + kTile * stride);
  if (is_read) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + kTile, stride);
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + kTile, stride);
  } else if (start) {  // a stride of 0 gives every row the bias
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start + kTile, 0);
    _tile_loadd(2, start, 0);
    _tile_loadd(3, start + kTile, 0);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < count; ++s, a += kWords, b += kWords) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + panel, 64);
    Unit::upper();
    _tile_loadd(5, a + panel, 64);
    Unit::lower();
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + kTile, stride);
  _tile_stored(2, lower, stride);
  _tile_stored(3, lower + kTile, stride);
}

// 32-bit sums in place of which their fp32 values are wanted.
inline void to_fp32(float* c, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kTile) {
      const __mmask16 mask = __mmask16(first_lanes(columns - j));
      const __m512i sums = _mm512_maskz_loadu_epi32(mask, c + r * stride + j);
      _mm512_mask_storeu_ps(c + r * stride + j, mask, _mm512_cvtepi32_ps(sums));
    }
}

template <typename Unit>
void gemm(const Operand& a, const Operand& b, const float* bias, float* c, int64_t num_m, int64_t num_n, int64_t num_k,
          int threads) {
  constexpr int64_t kTileK = Unit::kPerWord * kTile;
  const int64_t tiles = (num_k + kTileK - 1) / kTileK, panel = tiles * kWords;
  const int64_t row_panels = (num_m + kBlock - 1) / kBlock * 2, column_panels = (num_n + kBlock - 1) / kBlock * 2;
  static thread_local std::vector<uint32_t> scratch;
  scratch.resize(size_t(panel * (row_panels + column_panels)) + 16);
  uint32_t* const packed_b = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t(63));
  uint32_t* const packed_a = packed_b + panel * column_panels;
  std::vector<float> starts;
  if (bias) {
    starts.assign(size_t(column_panels * kTile), 0.0f);
    std::copy(bias, bias + num_n, starts.begin());
  }
  const int64_t row_blocks = (num_m + kRowBlock - 1) / kRowBlock;
  const int64_t column_blocks = (num_n + kColumnBlock - 1) / kColumnBlock;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < column_panels; ++p) pack_panel<Unit, false>(b, p * kTile, num_n, num_k, packed_b + p * panel);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < row_panels; ++p) pack_panel<Unit, true>(a, p * kTile, num_m, num_k, packed_a + p * panel);

    const TileConfig config;
    _tile_loadconfig(&config);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < row_blocks * column_blocks; ++task) {
      const int64_t first_row = task % row_blocks * kRowBlock, first_column = task / row_blocks * kColumnBlock;
      const int64_t last_row = std::min(first_row + kRowBlock, num_m);
      const int64_t last_column = std::min(first_column + kColumnBlock, num_n);
      for (int64_t k = 0; k == 0 || k < tiles; k += kChunk) {
        const int64_t count = std::min(kChunk, tiles - k);
        for (int64_t j = first_column; j < last_column; j += kBlock) {
          const uint32_t* panel_b = packed_b + j / kTile * panel + k * kWords;
          const float* start = bias ? starts.data() + j : nullptr;
          const int64_t columns = std::min(kBlock, num_n - j);
          for (int64_t i = first_row; i < last_row; i += kBlock) {
            const uint32_t* panel_a = packed_a + i / kTile * panel + k * kWords;
            const int64_t rows = std::min(kBlock, num_m - i);
            float* const corner = c + i * num_n + j;
            if (rows == kBlock && columns == kBlock) {
              multiply_panels<Unit>(panel_a, panel_b, panel, count, corner, num_n * 4, k > 0, start);
            } else {
              alignas(64) float edge[kBlock * kBlock];
              if (k > 0)
                for (int64_t r = 0; r < rows; ++r) std::memcpy(edge + r * kBlock, corner + r * num_n, columns * 4);
              multiply_panels<Unit>(panel_a, panel_b, panel, count, edge, kBlock * 4, k > 0, start);
              for (int64_t r = 0; r < rows; ++r) std::memcpy(corner + r * num_n, edge + r * kBlock, columns * 4);
            }
            if (std::is_same_v<Unit, Int8> && k + kChunk >= tiles) to_fp32(corner, rows, columns, num_n);
          }
        }
      }
    }
    _tile_release();
  }
}

}  // namespace

extern "C" {

// Linux lends the tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
int lp_gemm_is_supported() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// The arguments are those of gemm.cpp.
void lp_gemm(const void* a, int a_dtype, int64_t a_outer, int64_t a_inner, const void* b, int b_dtype, int64_t b_outer,
             int64_t b_inner, const float* bias, float* c, int64_t m, int64_t n, int64_t k, int threads) {
  const Operand left{a, a_dtype, a_outer, a_inner}, right{b, b_dtype, b_outer, b_inner};
  gemm<Bf16>(left, right, bias, c, m, n, k, threads);
}

// a and b: int8; strides as above.
void lp_gemm_int8(const void* a, int64_t a_outer, int64_t a_inner, const void* b, int64_t b_outer, int64_t b_inner,
                  float* c, int64_t m, int64_t n, int64_t k, int threads) {
  gemm<Int8>(Operand{a, 0, a_outer, a_inner}, Operand{b, 0, b_outer, b_inner}, nullptr, c, m, n, k, threads);
}

}  // extern "C"

#else

extern "C" {

int lp_gemm_is_supported() { return 0; }

void lp_gemm(const void*, int, int64_t, int64_t, const void*, int, int64_t, int64_t, const float*, float*, int64_t,
             int64_t, int64_t, int) {}

}  // extern "C"

#endif
