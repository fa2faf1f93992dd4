// Decoding on AVX-512. Two formats need no multiplication for each weight: fp8_block, where a scale is that of many, and
// mxfp4, where scales are powers of two.
#pragma once
#include <immintrin.h>

#include "weights/decode_vectors.hpp"

namespace jitmoe {

struct Decode512 {
  using Float = __m512;
  using Bits = __m512i;
  static constexpr int kLanes = 16;
#ifdef __AVX512BF16__
  static constexpr bool kFlushes = true;
#else
  static constexpr bool kFlushes = false;
#endif

  static Float broadcast(float value) { return _mm512_set1_ps(value); }
  template <Scale K>
  static Float load_scales(const typename ScaleOf<K>::type* scales) {
    if constexpr (K == Scale::float32) return _mm512_loadu_ps(scales);
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    if constexpr (K == Scale::float16) return _mm512_cvtph_ps(halves);
    static_assert(K != Scale::e8m0, "mxfp4 has a decoder of its own");
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  // Whether all are zero or have a magnitude from `least` to below `most`.
  static bool all_within(Float scales, float least, float most) {
    const Float magnitude = _mm512_abs_ps(scales);
    const __mmask16 inside = _mm512_cmp_ps_mask(magnitude, broadcast(least), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(magnitude, broadcast(most), _CMP_LT_OQ);
    return (inside | _mm512_cmp_ps_mask(magnitude, _mm512_setzero_ps(), _CMP_EQ_OQ)) == 0xffff;
  }
  // Each value two times side by side.
  static void twice(Float values, Float* to) {
    to[0] = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), values);
    to[1] = _mm512_permutexvar_ps(
        _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), values);
  }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }

  static Float from_int8(const uint8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  }
  // The bits of E4M3 are those of a half 2^-8 times as large, denormals too: scales make up for it.
  static constexpr float kE4m3Factor = 256.0f;
  static Float from_e4m3(const uint8_t* codes) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1),
                                            _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    return _mm512_cvtph_ps(halves);
  }
  static bool any_nan(const uint8_t* block) {
    const __m512i ones = _mm512_set1_epi8(0x7f);
    __mmask64 found = 0;
    for (int64_t i = 0; i < kBlockElements; i += 64)
      found |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(_mm512_loadu_si512(block + i), ones), ones);
    return found;
  }

  static __m512i load_words(const uint8_t* words) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
  }
  // The permutation looks at the lowest four bits alone.
  template <Format F>
  static Float nibbles(__m512i words, int n) {
    const __m512 values =
        F == Format::int4_group
            ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
            : _mm512_setr_ps(0, .5, 1, 1.5, 2, 3, 4, 6, -0.0f, -.5, -1, -1.5, -2, -3, -4, -6);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * n), values);
  }

  static void store(bf16* to, Bits bits) { _mm512_storeu_si512(to, bits); }

  // 32 bfloat16. As rounded_bits, without its guard: there are no NaNs.
  static __m512i rounded(Float low, Float high) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
    return upper_halves(rounded(low), rounded(high));
#endif
  }
  // Where a weight may be a denormal.
  static __m512i rounded_exactly(Float low, Float high) { return upper_halves(rounded(low), rounded(high)); }

 private:
  static __m512i rounded(Float value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i more = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_sub_epi32(more, odd, more, _mm512_set1_epi32(-1));
  }
  static __m512i upper_halves(__m512i low, __m512i high) {
    alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(low, _mm512_load_si512(kOdd), high);
  }
};

// fp8_block: one scale for the whole block, so a weight is one of 128 and a sign.
template <Shape S>
class TableDecoder : public BlockDecoder<S, TableDecoder<S>, Decode512> {
 public:
  void prepare(const float* scale) {
    const __m512 factor = Decode512::broadcast(*scale * Decode512::kE4m3Factor);
    usual_ = Decode512::all_within(Decode512::broadcast(*scale), 0.0f, kMostScale);
    alignas(16) uint8_t codes[128];
    for (int code = 0; code < 128; ++code) codes[code] = static_cast<uint8_t>(code);
    for (int part = 0; part < 4; ++part) {
      const __m512 low = Decode512::from_e4m3(codes + part * 32);
      const __m512 high = Decode512::from_e4m3(codes + part * 32 + 16);
      table_[part] =
          Decode512::rounded_exactly(Decode512::multiply(low, factor), Decode512::multiply(high, factor));
    }
    table_[3] = _mm512_mask_set1_epi16(table_[3], 0x80000000u, 0x7fc0);  // the code that is a NaN
  }
  bool usual(const uint8_t*) const { return usual_; }

  [[gnu::always_inline]] void four(const uint8_t* block, int64_t line, __m512i (&lines)[4][1]) const {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m512i codes = _mm512_cvtepu8_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + (line + n) * kKStep)));
      // A permutation finds one of 64.
      const __m512i low = _mm512_permutex2var_epi16(table_[0], codes, table_[1]);
      const __m512i high = _mm512_permutex2var_epi16(table_[2], codes, table_[3]);
      const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
      // The sign: magnitude ^ (codes << 8 & 0x8000).
      lines[n][0] =
          _mm512_ternarylogic_epi32(_mm512_mask_blend_epi16(upper, low, high), _mm512_slli_epi16(codes, 8),
                                    _mm512_set1_epi16(static_cast<int16_t>(0x8000)), 0x78);
    }
  }

 private:
  bool usual_ = false;
  __m512i table_[4];
};

// mxfp4: the scale is added to the exponent of all codes but zero, where no exponent leaves the range.
template <Shape S>
class ExponentDecoder : public BlockDecoder<S, ExponentDecoder<S>, Decode512> {
 public:
  void prepare(const uint8_t* scales) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    usual_ = !_mm256_cmplt_epu8_mask(bytes, _mm256_set1_epi8(kLeast)) &&
             !_mm256_cmpgt_epu8_mask(bytes, _mm256_set1_epi8(static_cast<char>(kMost)));
    for (int tile = 0; tile < 2; ++tile) {
      const __m128i half = tile ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
      const __m512i wide = _mm512_sub_epi32(_mm512_cvtepu8_epi32(half), _mm512_set1_epi32(127));
      const __m512i one = _mm512_and_si512(_mm512_slli_epi32(wide, 7), _mm512_set1_epi32(0xffff));
      exponents_[tile] = _mm512_or_si512(one, _mm512_slli_epi32(one, 16));
    }
  }
  bool usual(const uint8_t*) const { return usual_; }

  [[gnu::always_inline]] void four(const uint8_t* block, int64_t line, __m512i (&lines)[4][1]) const {
    alignas(64) static constexpr bf16 kCodes[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                                    0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                                    0xc000, 0xc040, 0xc080, 0xc0c0};
    // A permutation looks at five bits, of which the highest is of the next nibble.
    const __m512i values =
        _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(kCodes)));
    const __m512i words = _mm512_loadu_si512(block + line * kKStep / 2);
    const __m512i exponents = exponents_[line / kTile];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m512i codes = _mm512_srli_epi16(words, 4 * n);
      const __mmask32 nonzero = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(7));
      const __m512i unscaled = _mm512_permutexvar_epi16(codes, values);
      lines[n][0] = _mm512_mask_add_epi16(unscaled, nonzero, unscaled, exponents);
    }
  }

 private:
  // Codes have exponents from 126 to 129, so that these give 1 to 254.
  static constexpr uint8_t kLeast = 2, kMost = 252;
  bool usual_ = false;
  __m512i exponents_[2];  // of each tile, that of an output in both halves of its pairs
};

template <Shape S>
  requires(S.isa >= Isa::avx512 && S.format != Format::bfloat16)
struct DecoderOf<S> {
  using type = std::conditional_t<
      S.format == Format::fp8_block, TableDecoder<S>,
      std::conditional_t<S.format == Format::mxfp4, ExponentDecoder<S>, VectorDecoder<S, Decode512>>>;
};

}  // namespace jitmoe
