// Double to fp32, rounded to odd: toward zero, with the last bit set where anything was cut. What is then rounded to at
// least two bits fewer is rounded as the double would be. Plain C++17, called through ctypes by odd.py.

#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {

// Returns the largest finite |x|, or 0. NaN and Inf pass.
double lp_to_odd(const double* x, float* out, int64_t count, int threads) {
  double largest = 0;
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const double value = x[i], size = std::fabs(value);
    const float near = float(value);
    uint32_t bits;
    std::memcpy(&bits, &near, 4);
    const double found = std::fabs(double(near));
    const bool is_finite = size <= 1.7976931348623157e308;
    const uint32_t cut = (bits - uint32_t(found > size)) | 1u;  // of 0 the smallest fp32, of Inf the largest
    bits = is_finite && found != size ? cut : bits;
    std::memcpy(out + i, &bits, 4);
    largest = is_finite && size > largest ? size : largest;
  }
  return largest;
}
}
