// Grid: round values onto the grid of a scalar format as runtime/numerics/grid.py does, operation by operation in double:
// what cast.cpp does not do, since it computes in fp32. That is fp64 values, overflow to Inf or NaN, long tables, and
// formats whose constants are no fp32.
//
// Plain C++17, no headers of torch; called through ctypes by grid.py. Needs -ffp-contract=off and no -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "huge_pages.h"
#include "philox.h"

namespace {

// Mirrors GridPlan in grid.py, field by field.
struct GridPlan {
  int32_t emin, mantissa;  // of a float
  int32_t is_even;         // spacing 1 everywhere: an integer format
  int32_t is_signed;       // tables: of positive values alone it is not
  int32_t mode;            // 0 nearest_even, 1 nearest_away, 2 toward_zero, 3 stochastic
  int32_t has_top;         // whether what lies beyond becomes `top`, else it saturates
  int32_t has_tie;         // whether `tie` decides below `gap`
  int32_t has_negative_zero;
  double gap;   // the smallest value of a format with nothing between it and 0, else 0
  double tie;   // what lies above it, below `gap`, goes up
  double min, max, top;
  int64_t count;        // of the table's values, one past each end among them; 0: no table
  const double* table;
};

enum Mode { kEven, kAway, kZero, kStochastic };

inline uint64_t bits_of(double v) {
  uint64_t b;
  std::memcpy(&b, &v, 8);
  return b;
}

inline double double_of(uint64_t b) {
  double v;
  std::memcpy(&v, &b, 8);
  return v;
}

// t >= 0 as an integer.
template <int M>
inline double whole(double t, uint32_t word) {
  const double below = std::floor(t), rest = t - below;
  if (M == kEven) return std::nearbyint(t);
  if (M == kAway) return below + (rest >= 0.5 ? 1.0 : 0.0);
  if (M == kZero) return below;
  return below + (rest >= 1.0 - word * 0x1p-32 ? 1.0 : 0.0);
}

// What is done to every rounded value: overflow, the sign of zero, NaN.
inline double finished(const GridPlan& p, double q, double y) {
  const double inside = q > p.max ? p.max : q < p.min ? p.min : q;
  const bool is_beyond = q != inside, keeps = p.has_top == 0 || (p.mode == kZero && std::fabs(y) <= std::numeric_limits<double>::max());
  q = is_beyond && !keeps ? std::copysign(p.top, y) : inside;
  q = p.has_negative_zero ? q : q + 0.0;
  return y != y ? y : q;
}

template <class T, int M>
void round_run(const GridPlan& plan, const T* x, T* out, int64_t count, const uint32_t* __restrict words) {
  const GridPlan p = plan;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double y = x[i], a = std::fabs(y);
    const int64_t field = int64_t(bits_of(a) >> 52) - 1023, low = std::max<int64_t>(field, p.emin);
    const int64_t k = std::min<int64_t>(low, 1023);  // Inf divided by a finite spacing stays Inf
    double ulp = double_of(uint64_t(k - p.mantissa + 1023) << 52);
    ulp = p.is_even ? 1.0 : a < p.gap ? p.gap : ulp;
    double q = whole<M>(a / ulp, M == kStochastic ? words[i] : 0) * ulp;
    const bool is_up = M == kAway ? a >= p.tie : a > p.tie;
    q = p.has_tie && a < p.gap ? (is_up ? p.gap : 0.0) : q;
    out[i] = T(finished(p, std::copysign(q, y), y));
  }
}

template <class T, int M>
void look_up_run(const GridPlan& p, const T* x, T* out, int64_t count, const uint32_t* words) {
  const double *first = p.table, *last = p.table + p.count;
  for (int64_t i = 0; i < count; ++i) {
    const double y = x[i], inside = y != y ? 0.0 : std::min(std::max(y, first[0]), last[-1]);
    const double filled = std::max(first[0], inside);
    const int64_t reached = std::upper_bound(first, last, filled) - first - 1;
    const int64_t at = std::min<int64_t>(std::max<int64_t>(reached, 0), p.count - 2);
    const double below = first[at], above = first[at + 1];
    const bool mirrored = above <= 0.0;
    const double near = mirrored ? above : below, far = mirrored ? below : above;
    const double excess = (mirrored ? -1.0 : 1.0) * (2 * filled - (near + far));
    bool is_far;
    if (M == kEven) is_far = excess > 0 || (excess == 0 && near != 0);
    else if (M == kAway) is_far = excess >= 0;
    else if (M == kZero) is_far = filled == far;
    else is_far = std::fabs(filled - near) / std::fabs(far - near) >= 1.0 - words[i] * 0x1p-32;
    double q = is_far ? far : near;
    if (!p.is_signed && p.min > 0 && y <= 0) q = y;
    if (q == 0) q = std::copysign(q, y);
    out[i] = T(finished(p, q, y));
  }
}

template <class T, int M>
void run(const GridPlan& p, const T* x, T* out, int64_t begin, int64_t end, const RandomPlan& random) {
  constexpr int64_t kRun = 4096;
  std::vector<uint32_t> buffer(M == kStochastic ? kRun + 136 : 0);
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    const uint32_t* words = nullptr;
    if (M == kStochastic) {
      const int64_t element = random.offset + at, first = element / 4;
      philox(random, first, (element + count + 3) / 4 - first, buffer.data());
      words = buffer.data() + element % 4;
    }
    if (p.count) look_up_run<T, M>(p, x + at, out + at, count, words);
    else round_run<T, M>(p, x + at, out + at, count, words);
  }
}

template <class T>
void round_all(const GridPlan& p, const void* from, void* to, int64_t count, const RandomPlan* random, int threads) {
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const RandomPlan draw = random ? *random : RandomPlan{};
  const auto each = p.mode == kEven ? run<T, kEven> : p.mode == kAway ? run<T, kAway> : p.mode == kZero ? run<T, kZero> : run<T, kStochastic>;
  ask_for_huge_pages(out, count * int64_t(sizeof(T)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const int64_t share = (count / threads + 64) & ~int64_t(63);
    const int64_t begin = std::min(count, part * share);
    each(p, x, out, begin, std::min(count, begin + share), draw);
  }
}

}  // namespace

extern "C" {

// x and out: contiguous, of one dtype, fp64 if is_double, else fp32. random: null unless stochastic.
void lp_round(const GridPlan* plan, const void* x, void* out, int is_double, int64_t count, const RandomPlan* random, int threads) {
  if (is_double) round_all<double>(*plan, x, out, count, random, threads);
  else round_all<float>(*plan, x, out, count, random, threads);
}
}
