// Fingerprint: 128 bits by which two arrays of the same size are told apart, at the speed of reading them once.
//
// Two lanes, with keys and points of their own, each of 64 bits:
//
//   block of 4 KiB   NH (Black et al., UMAC, CRYPTO 1999): sum over its 64-bit words of
//                    (low half + key) mod 2^32 times (high half + key') mod 2^32, mod 2^64
//   array            the halves of its blocks' sums as the coefficients of a polynomial mod 2^61 - 1, at a secret point
//
// Two blocks that differ have equal sums with chance 2^-32 over the keys, and two polynomials of degree d have equal
// values with chance d / 2^61 over the point: below 2^-60 in both lanes for arrays up to 2^40 bytes.
//
// Plain C++17, no headers of torch; called through ctypes by runtime/kernels/cpu/fingerprint.py.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t WORDS = 512;  // of a block
constexpr int64_t BYTES = 8 * WORDS;
constexpr int LANES = 2;
constexpr uint64_t PRIME = (uint64_t(1) << 61) - 1;

// Mirrors Secret in fingerprint.py.
struct Secret {
  uint32_t low[LANES][WORDS], high[LANES][WORDS];
  uint64_t point[LANES];  // below PRIME
};

typedef uint64_t Word __attribute__((aligned(1), may_alias));  // of an array that may begin at any byte

void nh(const Word* __restrict words, const Secret& secret, uint64_t* __restrict sums) {
  uint64_t first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < WORDS; ++i) {
    const uint32_t low = uint32_t(words[i]), high = uint32_t(words[i] >> 32);
    first += uint64_t(low + secret.low[0][i]) * uint32_t(high + secret.high[0][i]);
    second += uint64_t(low + secret.low[1][i]) * uint32_t(high + secret.high[1][i]);
  }
  sums[0] = first;
  sums[1] = second;
}

uint64_t next(uint64_t value, uint64_t point, uint64_t coefficient) {
  const unsigned __int128 product = static_cast<unsigned __int128>(value) * point + coefficient;
  const uint64_t folded = (uint64_t(product) & PRIME) + uint64_t(product >> 61);
  return folded >= PRIME ? folded - PRIME : folded;
}

}  // namespace

extern "C" void lp_fingerprint(const Secret* secret, const void* data, int64_t size, uint64_t* out, int threads) {
  const char* bytes = static_cast<const char*>(data);
  const int64_t whole = size / BYTES, rest = size % BYTES, count = whole + (rest != 0);
  std::vector<uint64_t> sums(LANES * count);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < whole; ++block) {
    nh(reinterpret_cast<const Word*>(bytes + block * BYTES), *secret, &sums[LANES * block]);
  }
  if (rest) {
    Word words[WORDS] = {};
    std::memcpy(words, bytes + whole * BYTES, rest);
    nh(words, *secret, &sums[LANES * whole]);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    uint64_t value = 1;
    for (int64_t block = 0; block < count; ++block) {
      const uint64_t sum = sums[LANES * block + lane];
      value = next(next(value, secret->point[lane], uint32_t(sum)), secret->point[lane], sum >> 32);
    }
    out[lane] = value;
  }
}
