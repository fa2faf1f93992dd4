// Decoding on AVX2 with F16C.
#pragma once
#include <immintrin.h>

#include "weights/decode_vectors.hpp"

namespace jitmoe {

struct Decode256 {
  using Float = __m256;
  using Bits = __m256i;
  static constexpr int kLanes = 8;
  static constexpr bool kFlushes = false;

  static Float broadcast(float value) { return _mm256_set1_ps(value); }
  template <Scale K>
  static Float load_scales(const typename ScaleOf<K>::type* scales) {
    if constexpr (K == Scale::float32) return _mm256_loadu_ps(scales);
    if constexpr (K == Scale::bfloat16)
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(scales)), 16));
    if constexpr (K == Scale::float16) return _mm256_cvtph_ps(load_half(scales));
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = ScaleOf<K>::value(scales[i]);
    return _mm256_loadu_ps(values);
  }
  // Whether all are zero or have a magnitude from `least` to below `most`.
  static bool all_within(Float scales, float least, float most) {
    const Float magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), scales);
    const Float large = _mm256_cmp_ps(magnitude, _mm256_set1_ps(least), _CMP_GE_OQ);
    const Float inside = _mm256_and_ps(large, _mm256_cmp_ps(magnitude, _mm256_set1_ps(most), _CMP_LT_OQ));
    const Float zero = _mm256_cmp_ps(magnitude, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return _mm256_movemask_ps(_mm256_or_ps(inside, zero)) == 0xff;
  }
  // Each value two times side by side.
  static void twice(Float values, Float* to) {
    to[0] = _mm256_permutevar8x32_ps(values, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    to[1] = _mm256_permutevar8x32_ps(values, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
  }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }

  static Float from_int8(const uint8_t* codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
  }
  // The bits of E4M3 are those of a half 2^-8 times as large, denormals too: scales make up for it.
  static constexpr float kE4m3Factor = 256.0f;
  static Float from_e4m3(const uint8_t* codes) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m128i halves = _mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(wide, 8), 1),
                                         _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
    return _mm256_cvtph_ps(halves);
  }
  static bool any_nan(const uint8_t* block) {
    const __m256i ones = _mm256_set1_epi8(0x7f);
    __m256i found = _mm256_setzero_si256();
    for (int64_t i = 0; i < kBlockElements; i += 32) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + i));
      found = _mm256_or_si256(found, _mm256_cmpeq_epi8(_mm256_and_si256(codes, ones), ones));
    }
    return !_mm256_testz_si256(found, found);
  }

  static __m256i load_words(const uint8_t* words) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  }
  template <Format F>
  static Float nibbles(__m256i words, int n) {
    const __m256i codes = _mm256_and_si256(_mm256_srli_epi32(words, 4 * n), _mm256_set1_epi32(0xf));
    if constexpr (F == Format::int4_group)
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)));
    const __m256i signs = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2m1), codes), _mm256_castsi256_ps(signs));
  }

  static void store(bf16* to, Bits bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits); }
  static Bits rounded(Float low, Float high) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xd8);
  }

 private:
  static __m128i load_half(const uint16_t* values) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  }
  // As rounded_bits, without its guard: there are no NaNs.
  static __m256i rounded(Float value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  }
};

template <Shape S>
  requires((S.isa == Isa::avx2 || S.isa == Isa::amx_avx2) && S.format != Format::bfloat16)
struct DecoderOf<S> {
  using type = VectorDecoder<S, Decode256>;
};

}  // namespace jitmoe
