// AVX2 with FMA: 8 lanes, 16 registers.
#pragma once
#include <immintrin.h>

#include "gemm/f32.hpp"
#include "weights/decode_avx2.hpp"

namespace jitmoe {

struct Simd256 {
  using Float = __m256;
  using Bits = __m256i;
  static constexpr int kLanes = 8;

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float load_some(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_some(float* p, int64_t n, Float v) { _mm256_maskstore_ps(p, first(n), v); }
  static Bits load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Bits zero_bits() { return _mm256_setzero_si256(); }
  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float as_float(Bits v) { return _mm256_castsi256_ps(v); }
  static Bits as_bits(Float v) { return _mm256_castps_si256(v); }
  static Float low_half(Bits pairs) { return as_float(_mm256_slli_epi32(pairs, 16)); }
  static Float high_half(Bits pairs) {
    return as_float(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static Bits first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  // 8 x 8 transpose of 32-bit lanes: within 128-bit halves, then of the halves.
  static void transpose(Bits (&row)[8]) {
    Bits next[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      next[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
      next[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      row[i] = _mm256_unpacklo_epi64(next[i], next[i + 2]);
      row[i + 1] = _mm256_unpackhi_epi64(next[i], next[i + 2]);
      row[i + 2] = _mm256_unpacklo_epi64(next[i + 1], next[i + 3]);
      row[i + 3] = _mm256_unpackhi_epi64(next[i + 1], next[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Bits low = row[i], high = row[i + 4];
      row[i] = _mm256_permute2x128_si256(low, high, 0x20);
      row[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
    }
  }
};

template <Shape S>
  requires(S.isa == Isa::avx2)
struct BackEndOf<S> {
  using type = GemmF32<S, Simd256, kAvx2Tuning>;
};

}  // namespace jitmoe
