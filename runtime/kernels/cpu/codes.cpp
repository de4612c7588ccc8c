// Decode: the fp32 values of codes; codes.h has the arithmetic. Plain C++17, called through ctypes by codes.py.

#include <algorithm>
#include <cstdint>

#include "codes.h"
#include "huge_pages.h"

extern "C" {

// bytes: of a code: 1 uint8, 4 int32, 8 int64. Returns 1 if a code is not one of the format.
int lp_decode(const CodePlan* plan, const void* codes, int bytes, float* out, int64_t count, int threads) {
  ask_for_huge_pages(out, count * 4);
  int is_beyond = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : is_beyond)
  for (int part = 0; part < threads; ++part) {
    const int64_t share = (count / threads + 64) & ~int64_t(63);
    const int64_t begin = std::min(count, part * share), size = std::min(count, begin + share) - begin;
    if (bytes == 1) is_beyond |= decode_run<uint8_t, int32_t>(*plan, static_cast<const uint8_t*>(codes) + begin, out + begin, size);
    if (bytes == 4) is_beyond |= decode_run<int32_t, int32_t>(*plan, static_cast<const int32_t*>(codes) + begin, out + begin, size);
    if (bytes == 8) is_beyond |= decode_run<int64_t, int64_t>(*plan, static_cast<const int64_t*>(codes) + begin, out + begin, size);
  }
  return is_beyond;
}
}
