// What this machine does right now: read bandwidth, the way of a cache line from core to core and back, and how many
// operations a second its units do on registers. Plain C++17, called through ctypes by _machine.py.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AMX_TILE__)
#include <immintrin.h>
#endif

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Operations of one `step`, times the rate at which `threads` threads make steps.
template <class Step>
double rate(int threads, double operations, Step step) {
  constexpr int64_t kSteps = 200000;
  const double start = seconds();
#pragma omp parallel num_threads(threads)
  step(kSteps);
  return threads * kSteps * operations / (seconds() - start);
}

#ifdef __AMX_TILE__
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

bool tiles_are_there() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}
#endif

}  // namespace

extern "C" {

// Bytes a second that `threads` threads read together.
double lp_read_bandwidth(const int64_t* data, int64_t count, int threads) {
  int64_t sum = 0;
  const double start = seconds();
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += data[i];
  const double took = seconds() - start;
  return sum == 42 ? 0 : double(count) * 8 / took;
}

// Seconds for a cache line to another core and back; a thread that waits does nothing else.
double lp_round_trip(int64_t turns) {
  alignas(64) std::atomic<int64_t> ball{0};
  double took = 0;
#pragma omp parallel num_threads(2)
  {
    if (omp_get_num_threads() == 2) {
      const int64_t me = omp_get_thread_num();
      const double start = seconds();
      for (int64_t turn = me; turn < 2 * turns; turn += 2) {
        while (ball.load(std::memory_order_acquire) != turn) {}
        ball.store(turn + 1, std::memory_order_release);
      }
      if (me == 0) took = seconds() - start;
    }
  }
  return took / double(turns);
}

// Operations a second, 2 for a multiply-add, of 0 fp32, 1 bf16, 2 int8 units; 0 where there are none.
double lp_peak(int unit, int threads) {
#ifdef __AVX512F__
  if (unit == 0)
    return rate(threads, 16 * 16 * 2, [](int64_t steps) {
      __m512 sums[16] = {}, a = _mm512_set1_ps(1e-9f), b = _mm512_set1_ps(0.5f);
      for (int64_t i = 0; i < steps; ++i) {
        asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) sums[j] = _mm512_fmadd_ps(a, b, sums[j]);
      }
      for (auto& sum : sums) asm volatile("" : : "v"(sum));
    });
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
  if (tiles_are_there()) {
    const auto ops = 4.0 * 16 * 16 * (unit == 1 ? 32 : 64) * 2;
    return rate(threads, ops, [unit](int64_t steps) {
      configure();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      _tile_zero(7);
      for (int64_t i = 0; i < steps; ++i) {
        if (unit == 1) {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else {
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
      }
      _tile_release();
    });
  }
#endif
#ifdef __AVX512BF16__
  if (unit == 1)
    return rate(threads, 16 * 32 * 2, [](int64_t steps) {
      __m512 sums[16] = {};
      __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;
      for (int64_t i = 0; i < steps; ++i) {
        asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, b);
      }
      for (auto& sum : sums) asm volatile("" : : "v"(sum));
    });
#endif
#ifdef __AVX512VNNI__
  if (unit == 2)
    return rate(threads, 16 * 64 * 2, [](int64_t steps) {
      __m512i sums[16] = {}, a = _mm512_set1_epi8(1), b = a;
      for (int64_t i = 0; i < steps; ++i) {
        asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
      }
      for (auto& sum : sums) asm volatile("" : : "v"(sum));
    });
#endif
  return 0;
}
}
