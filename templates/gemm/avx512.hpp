// AVX-512: 16 lanes, 32 registers.
#pragma once
#include <immintrin.h>

#include "gemm/f32.hpp"
#include "weights/decode_avx512.hpp"

namespace jitmoe {

struct Simd512 {
  using Float = __m512;
  using Bits = __m512i;
  static constexpr int kLanes = 16;

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_some(float* p, int64_t n, Float v) { _mm512_mask_storeu_ps(p, first(n), v); }
  static Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }
  static Bits zero_bits() { return _mm512_setzero_si512(); }
  static Float set(float value) { return _mm512_set1_ps(value); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float as_float(Bits v) { return _mm512_castsi512_ps(v); }
  static Bits as_bits(Float v) { return _mm512_castps_si512(v); }
  static Float low_half(Bits pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
  static Float high_half(Bits pairs) {
    return as_float(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  // 16 x 16 transpose of 32-bit lanes: within 128-bit quarters, then of the quarters.
  static void transpose(Bits (&row)[16]) {
    Bits next[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      next[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      next[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      row[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
      row[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
      row[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
      row[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Bits a = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
      const Bits b = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
      const Bits c = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
      const Bits d = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
      row[i] = _mm512_shuffle_i32x4(a, c, 0x88);
      row[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
      row[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
      row[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
  }
};

template <Shape S>
  requires(S.isa == Isa::avx512)
struct BackEndOf<S> {
  using type = GemmF32<S, Simd512, kAvx512Tuning>;
};

}  // namespace jitmoe
