// Grid: round values onto the grid of a scalar format as runtime/numerics/grid.py does, operation by operation in double:
// what cast.cpp does not do, since it computes in fp32. That is fp64 values, overflow to Inf or NaN, long tables, and
// formats whose constants are no fp32.
//
// Plain C++17, no headers of torch; called through ctypes by grid.py. Needs -ffp-contract=off and no -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bits.h"
#include "grid_plan.h"
#include "huge_pages.h"
#include "philox.h"

namespace {

// t >= 0, finite, as an integer. What decides is said by arithmetic, of which the compiler makes vectors: with rest in
// [0, 1) twice the rest has 1 before its point from 1/2 on, and the sign of a difference is exact. limit: the rest from
// which on a value goes up by chance, 1 less its random number in [0, 1).
template <int M>
inline double whole(double t, double limit) {
  const double below = std::floor(t), rest = t - below;
  if (M == kEven) return std::nearbyint(t);
  if (M == kAway) return below + std::floor(rest + rest);
  if (M == kZero) return below;
  return below + (std::floor(rest - limit) + 1.0);
}

// What is done to every rounded value: overflow, the sign of zero, NaN.
inline double finished(const GridPlan& p, double q, double y) {
  const double inside = q > p.max ? p.max : q < p.min ? p.min : q;
  const bool is_beyond = q != inside, keeps = p.has_top == 0 || (p.mode == kZero && std::fabs(y) <= std::numeric_limits<double>::max());
  q = is_beyond && !keeps ? std::copysign(p.top, y) : inside;
  q = p.has_negative_zero ? q : q + 0.0;
  return y != y ? y : q;
}

// has_gap: the spacing may be no power of two; else to divide by it is to multiply.
template <class T, int M, bool HasGap>
void round_run(const GridPlan& plan, const T* x, T* out, int64_t count, const double* __restrict limits) {
  const GridPlan p = plan;
  const double greatest = std::numeric_limits<double>::max();
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double y = x[i], size = std::fabs(y), a = size < greatest ? size : greatest;  // Inf, and NaN, which is not kept
    const int64_t field = int64_t(bits_of(a) >> 52) - 1023;
    const int64_t k = std::min<int64_t>(std::max<int64_t>(field, p.emin), 1000);  // what is larger is beyond all formats
    double ulp = double_of(uint64_t(k - p.mantissa + 1023) << 52), inverse = double_of(uint64_t(1023 - k + p.mantissa) << 52);
    ulp = p.is_even ? 1.0 : HasGap && a < p.gap ? p.gap : ulp;
    inverse = p.is_even ? 1.0 : inverse;
    double q = whole<M>(HasGap ? a / ulp : a * inverse, M == kStochastic ? limits[i] : 0) * ulp;
    const bool is_up = M == kAway ? a >= p.tie : a > p.tie;
    q = p.has_tie && a < p.gap ? (is_up ? p.gap : 0.0) : q;
    out[i] = T(finished(p, std::copysign(q, y), y));
  }
}

// The last value of the table that is not above y, by bisection of many y side by side; behind the table there is Inf.
template <class T, int M>
void look_up_run(const GridPlan& plan, const T* x, T* out, int64_t count, const double* limits) {
  constexpr int64_t kLanes = 64;
  const GridPlan p = plan;
  const double* const table = p.table;
  const double least = table[0], greatest = table[p.count - 1];
  int64_t top = 1;
  while (2 * top < p.count) top *= 2;
  double filled[kLanes];
  int64_t reached[kLanes];
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t lanes = std::min(kLanes, count - first);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const double y = x[first + i], low = y > least ? y : least;  // of NaN the least, which is not kept
      filled[i] = low < greatest ? low : greatest;
      reached[i] = 0;
    }
    for (int64_t step = top; step; step /= 2) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t further = reached[i] + step;
        reached[i] = table[further] <= filled[i] ? further : reached[i];
      }
    }
    const double sign_kept = !p.is_signed && p.min > 0 ? 0.0 : -std::numeric_limits<double>::infinity();
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const double y = x[first + i];
      const int64_t at = reached[i] < p.count - 2 ? reached[i] : p.count - 2;
      const double below = table[at], above = table[at + 1];
      const bool mirrored = above <= 0.0;
      const double near = mirrored ? above : below, far = mirrored ? below : above;
      const double excess = (mirrored ? -1.0 : 1.0) * (2 * filled[i] - (near + far));
      bool is_far;
      if (M == kEven) is_far = (excess > 0) | ((excess == 0) & (near != 0));
      else if (M == kAway) is_far = excess >= 0;
      else if (M == kZero) is_far = filled[i] == far;
      else is_far = std::fabs(filled[i] - near) / std::fabs(far - near) >= limits[first + i];
      double q = is_far ? far : near;
      q = y <= sign_kept ? y : q;
      q = q == 0 ? std::copysign(q, y) : q;
      out[first + i] = T(finished(p, q, y));
    }
  }
}

template <class T, int M>
void run(const GridPlan& p, const T* x, T* out, int64_t begin, int64_t end, const RandomPlan& random) {
  constexpr int64_t kRun = 4096;
  std::vector<uint32_t> buffer(M == kStochastic ? kRun + 136 : 0);
  std::vector<double> limits(M == kStochastic ? kRun : 0);
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    if (M == kStochastic) {
      const int64_t element = random.offset + at, first = element / 4;
      philox(random, first, (element + count + 3) / 4 - first, buffer.data());
      const uint32_t* words = buffer.data() + element % 4;
      for (int64_t i = 0; i < count; ++i) limits[i] = 1.0 - words[i] * 0x1p-32;
    }
    if (p.count) look_up_run<T, M>(p, x + at, out + at, count, limits.data());
    else if (p.gap > 0) round_run<T, M, true>(p, x + at, out + at, count, limits.data());
    else round_run<T, M, false>(p, x + at, out + at, count, limits.data());
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
