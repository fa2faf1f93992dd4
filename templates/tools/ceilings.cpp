// Measures what this machine can do at most: arithmetic on registers, and reading memory. `jitmoe bench` divides by
// these figures, so they are measured on the same threads as the kernels and in the same minute.
//
// Each jitmoe_peak_ function returns operations or bytes a second, or 0 where the compiler's flags lack the
// instruction. A multiplication and an addition are two operations.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

#ifdef __AMX_BF16__
#include "gemm/tiles.hpp"
#endif

namespace {

// Two multiply-adds a cycle with a latency of four or five cycles need at most ten chains; there are 16 registers.
constexpr int kChains = 12;

// Result of a loop. If nobody read it, the compiler would drop the loop.
volatile double sink;

// Seconds from the start of the first thread to the end of the last.
template <class Loop>
double seconds_of(int64_t threads, Loop loop) {
  double begin = 0.0, end = 0.0;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
#pragma omp barrier
#pragma omp master
    begin = omp_get_wtime();
    const double value = loop(omp_get_thread_num());
#pragma omp critical
    {
      sink = value;
      end = omp_get_wtime();
    }
  }
  return end - begin;
}

// The values stay near one: products of zeros take less power, and denormals more time.
constexpr float kFactor = 0.75f, kAddend = 0.25f;

// The widest vectors that the flags allow, in the compiler's notation.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// Written out, as the flags forbid the compiler to contract a multiplication and an addition.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

double fma_loop(int64_t steps) {
  Vector sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = Vector{} + (1.0f + 0.01f * static_cast<float>(i));
  const Vector factor = Vector{} + kFactor, addend = Vector{} + kAddend;
  for (int64_t step = 0; step < steps; ++step)
    for (int i = 0; i < kChains; ++i) sum[i] = multiply_add(sum[i], factor, addend);
  for (int i = 1; i < kChains; ++i) sum[0] += sum[i];
  return sum[0][0];
}

#ifdef __AVX512BF16__
// Pairs (x, x) times (1, -1): the sums do not change, and no operand is zero.
double dot_loop(int64_t steps) {
  __m512 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(1.0f + static_cast<float>(i));
  const __m512bh left = _mm512_cvtne2ps_pbh(_mm512_set1_ps(kFactor), _mm512_set1_ps(kFactor));
  const __m512bh right = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f80bf80));  // the pair 1, -1
  for (int64_t step = 0; step < steps; ++step)
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], left, right);
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  return _mm512_cvtss_f32(sum[0]);
}
#endif

#ifdef __AMX_BF16__
constexpr int kProducts = 4;  // of tiles: one accumulator each, as in the kernel

// Pairs (x, x) times (1, -1), as above, in whole tiles.
double tile_loop(int64_t steps) {
  jitmoe::amx::Configuration configuration{};
  configuration.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.row_bytes[tile] = jitmoe::amx::kRowBytes;
    configuration.rows[tile] = jitmoe::amx::kRows;
  }
  alignas(64) uint32_t left[256], right[256];
  alignas(64) float sum[256];
  for (int i = 0; i < 256; ++i) left[i] = 0x3f403f40, right[i] = 0x3f80bf80, sum[i] = 1.0f;
  jitmoe::amx::load_configuration(configuration);
  jitmoe::amx::load<0>(sum, 64);
  jitmoe::amx::load<1>(sum, 64);
  jitmoe::amx::load<2>(sum, 64);
  jitmoe::amx::load<3>(sum, 64);
  jitmoe::amx::load<4>(left, 64);
  jitmoe::amx::load<5>(right, 64);
  for (int64_t step = 0; step < steps; ++step) {
    jitmoe::amx::multiply_add<0, 4, 5>();
    jitmoe::amx::multiply_add<1, 4, 5>();
    jitmoe::amx::multiply_add<2, 4, 5>();
    jitmoe::amx::multiply_add<3, 4, 5>();
  }
  jitmoe::amx::store<0>(sum, 64);
  jitmoe::amx::release();
  return sum[0];
}
#endif

#ifdef __AVX512F__
// The flags of no instruction set include VNNI, so the caller must ask the CPU first.
__attribute__((target("avx512f,avx512vnni"))) double vnni_loop(int64_t steps) {
  __m512i sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_epi32(i);
  const __m512i left = _mm512_set1_epi32(0x07050301), right = _mm512_set1_epi32(0x02fe03fd);
  for (int64_t step = 0; step < steps; ++step)
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], left, right);
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum[0]));
}
#endif

#ifdef __AVX2__
double read_lines(const char* bytes, int64_t count) {
  __m256i sum[4] = {};
  for (int64_t at = 0; at < count; at += 128)
    for (int i = 0; i < 4; ++i)
      sum[i] =
          _mm256_xor_si256(sum[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + at + 32 * i)));
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return _mm256_extract_epi32(all, 0);
}
#else
double read_lines(const char* bytes, int64_t count) {
  int64_t sum[16] = {};
  for (int64_t at = 0; at < count; at += 128)
    for (int i = 0; i < 16; ++i) {
      int64_t word;
      std::memcpy(&word, bytes + at + 8 * i, 8);
      sum[i] ^= word;
    }
  for (int i = 1; i < 16; ++i) sum[0] ^= sum[i];
  return static_cast<double>(sum[0]);
}
#endif

template <class Loop>
double operations(int64_t threads, int64_t steps, int64_t per_step, Loop loop) {
  const double seconds = seconds_of(threads, [&](int) { return loop(steps); });
  return static_cast<double>(threads * steps * per_step) / seconds;
}

}  // namespace

extern "C" {

// float32 multiply-add, the widest vectors that the flags allow.
double jitmoe_peak_fma(int64_t threads, int64_t steps) {
  return operations(threads, steps, kChains * kLanes * 2, fma_loop);
}

// VDPBF16PS.
double jitmoe_peak_bf16([[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t steps) {
#ifdef __AVX512BF16__
  return operations(threads, steps, kChains * 32 * 2, dot_loop);
#else
  return 0.0;
#endif
}

// TDPBF16PS on whole tiles: 16 x 16 x 32 multiplications and additions each.
double jitmoe_peak_tmul([[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t steps) {
#ifdef __AMX_BF16__
  return operations(threads, steps, kProducts * 16 * 16 * 32 * 2, tile_loop);
#else
  return 0.0;
#endif
}

// VPDPBUSD on 512 bits; only where the CPU has AVX512-VNNI.
double jitmoe_peak_vnni([[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t steps) {
#ifdef __AVX512F__
  return operations(threads, steps, kChains * 64 * 2, vnni_loop);
#else
  return 0.0;
#endif
}

// Read `bytes` bytes at `address` once, a contiguous part for each thread.
double jitmoe_peak_read(int64_t threads, int64_t address, int64_t bytes) {
  const int64_t part = bytes / threads / 128 * 128;
  const char* base = reinterpret_cast<const char*>(address);
  const double seconds =
      seconds_of(threads, [&](int thread) { return read_lines(base + thread * part, part); });
  return static_cast<double>(part * threads) / seconds;
}

// Writes every page, and returns the seconds: untouched pages share one page of zeros, which is read from the cache.
double jitmoe_fill(int64_t threads, int64_t address, int64_t bytes) {
  const int64_t part = bytes / threads;
  char* base = reinterpret_cast<char*>(address);
  return seconds_of(threads, [&](int thread) {
    std::memset(base + thread * part, 0x5a, static_cast<size_t>(part));
    return 0.0;
  });
}
}
