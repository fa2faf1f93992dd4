// Operands of tiles from rows, strips and LoRA matrices. With AVX512-BF16 these are a few instructions each; otherwise
// loops, which the compiler makes into what vectors there are, and which give the same tiles.
//
// A float32 value is the sum of two bfloat16 values, high and low, to 16 bits: low = bfloat16(value - high). Where the
// difference is not finite, high alone is the value, infinite or a NaN.
//
//   tile of a LoRA matrix     lane      0       1    ...    7       8       9   ...   15
//                             k 0, 1  [h0 h0] [h1 h1]    [h7 h7] [l0 l0] [l1 l1]   [l7 l7]      8 ranks, both halves
//                              ...    [ranks 0 .. 15]                                           bfloat16: 16 ranks
#pragma once
#include <cstring>

#include "gemm/interface.hpp"
#ifdef __AVX512BF16__
#include "gemm/avx512.hpp"
#endif

namespace jitmoe {

struct Halves {
  bf16 high;
  bf16 low;
};
inline Halves split(float value) {
  const bf16 high = to_bf16(value);
  const float rest = value - to_float(high);
  return {high, rest - rest == 0.0f ? to_bf16(rest) : bf16{0}};
}

// Ranks of one tile of a LoRA matrix.
template <bool Bf16>
inline constexpr int64_t kTileRanks = Bf16 ? kTile : kTile / 2;

#ifdef __AVX512BF16__

inline __m512i bits_of(__m512bh values) { return reinterpret_cast<__m512i>(values); }
inline __m256i bits_of(__m256bh values) { return reinterpret_cast<__m256i>(values); }

// What is left of 16 values when their high halves are taken away.
inline __m512 rest_of(__m512 values, __m256i high) {
  const __m512 rest =
      _mm512_sub_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(rest, rest), _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_maskz_mov_ps(finite, rest);
}

// Lanes of 16 bits from a and b, where those of b are numbered from 32 on.
struct alignas(64) LaneOrder {
  uint16_t lane[32];
  template <class Order>
  constexpr explicit LaneOrder(Order&& order) : lane{} {
    for (int i = 0; i < 32; ++i) lane[i] = static_cast<uint16_t>(order(i / 2, i % 2));
  }
  __m512i of(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, _mm512_load_si512(lane), b); }
};
inline constexpr LaneOrder kPairHalves([](int pair, int odd) { return pair + 16 * odd; });
inline constexpr LaneOrder kPairFirst([](int pair, int odd) { return pair + 32 * odd; });
inline constexpr LaneOrder kPairLast([](int pair, int odd) { return 16 + pair + 32 * odd; });
inline constexpr LaneOrder kPairQuarters([](int pair, int odd) {
  return pair % 8 + 8 * odd + pair / 8 * 32;
});

// The first `columns` of 32 values as bfloat16, then zeros.
inline __m512i load_rounded(const float* values, int64_t columns) {
  const __m512 low = Simd512::load_some(values, smaller(columns, 16));
  const __m512 high = Simd512::load_some(values + 16, columns > 16 ? columns - 16 : 0);
  return bits_of(_mm512_cvtne2ps_pbh(high, low));
}
inline void pack_rounded(const float* values, int64_t columns, bf16* row) {
  _mm512_storeu_si512(row, load_rounded(values, columns));
}

// Two rows of a strip -> their line of pairs in a block.
inline void pair_rows(const float* even, const float* odd, bf16* line) {
  for (int64_t half = 0; half < 2; ++half) {
    const __m512i both = bits_of(
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd + half * kTile), _mm512_loadu_ps(even + half * kTile)));
    _mm512_storeu_si512(line + half * kTileElements, kPairHalves.of(both, both));
  }
}
inline void pair_rows(const bf16* even, const bf16* odd, bf16* line) {
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(line, kPairFirst.of(a, b));
  _mm512_storeu_si512(line + kTileElements, kPairLast.of(a, b));
}

// Rows `j` and `j + 8` of a tile before its transpose: the halves of 32 values of one rank.
inline void split_rank(const float* values, int64_t count, __m512i& high, __m512i& low) {
  const __m512 first = Simd512::load_some(values, smaller(count, 16));
  const __m512 last = Simd512::load_some(values + 16, count > 16 ? count - 16 : 0);
  high = bits_of(_mm512_cvtne2ps_pbh(last, first));
  low = bits_of(_mm512_cvtne2ps_pbh(rest_of(last, _mm512_extracti64x4_epi64(high, 1)),
                                    rest_of(first, _mm512_castsi512_si256(high))));
}

// Both values of a pair of k, of 8 ranks with their halves or of 16.
inline __m512i pair_ranks(const float* even, int64_t evens, const float* odd, int64_t odds) {
  const __m256 a = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << evens) - 1), even);
  const __m256 b = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << odds) - 1), odd);
  const __m512 both = _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
  const __m256i high = bits_of(_mm512_cvtneps_pbh(both));
  const __m256i low = bits_of(_mm512_cvtneps_pbh(rest_of(both, high)));
  return kPairQuarters.of(_mm512_castsi256_si512(high), _mm512_castsi256_si512(low));
}
inline __m512i pair_ranks(const bf16* even, int64_t evens, const bf16* odd, int64_t odds) {
  const __m256i a = _mm256_maskz_loadu_epi16(Simd512::first(evens), even);
  const __m256i b = _mm256_maskz_loadu_epi16(Simd512::first(odds), odd);
  return kPairFirst.of(_mm512_castsi256_si512(a), _mm512_castsi256_si512(b));
}

// 16 values of two ranks: their high halves twice, and their low halves as one line of pairs.
inline void pair_halves(const float* even, const float* odd, bf16* highs, bf16* odd_highs, bf16* lows) {
  const __m512 values[] = {_mm512_loadu_ps(even), _mm512_loadu_ps(odd)};
  bf16* const lines[] = {highs, odd_highs};
  __m512 rest[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i high = bits_of(_mm512_cvtneps_pbh(values[i]));
    const __m512i wide = _mm512_cvtepu16_epi32(high);
    _mm512_storeu_si512(lines[i], _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16)));
    rest[i] = rest_of(values[i], high);
  }
  const __m512i both = bits_of(_mm512_cvtne2ps_pbh(rest[1], rest[0]));
  _mm512_storeu_si512(lows, kPairHalves.of(both, both));
}

// `ranks` ranks from `rank` on x `ks` values from `k` on -> one tile of pairs, zero outside the matrix.
template <bool Bf16>
void pack_lora(const LoraView<Bf16>& lora, int64_t k, int64_t ks, int64_t rank, int64_t ranks, bf16* tile) {
  const auto* corner = lora.data + k * lora.k_stride + rank * lora.rank_stride;
  __m512i row[kTile];
  if (lora.rank_stride == 1 && lora.k_stride != 1) {
    for (int64_t i = 0; i < kTile; ++i)
      row[i] = pair_ranks(corner + 2 * i * lora.k_stride, 2 * i < ks ? ranks : 0,
                          corner + (2 * i + 1) * lora.k_stride, 2 * i + 1 < ks ? ranks : 0);
  } else {
    for (int64_t i = 0; i < kTileRanks<Bf16>; ++i) {
      const auto* values = corner + i * lora.rank_stride;
      typename LoraView<Bf16>::Element gathered[kKStep];
      if (lora.k_stride != 1) {  // neighbours on neither axis
        for (int64_t c = 0; i < ranks && c < ks; ++c) gathered[c] = values[c * lora.k_stride];
        values = gathered;
      }
      const int64_t count = i < ranks ? ks : 0;
      if constexpr (Bf16)
        row[i] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), values);
      else
        split_rank(values, count, row[i], row[i + kTileRanks<Bf16>]);
    }
    Simd512::transpose(row);
  }
  for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(tile + i * kKStep, row[i]);
}

#else

inline void pack_rounded(const float* values, int64_t columns, bf16* row) {
  for (int64_t c = 0; c < kKStep; ++c) row[c] = c < columns ? to_bf16(values[c]) : bf16{0};
}

inline bf16 as_bf16(float value) { return to_bf16(value); }
inline bf16 as_bf16(bf16 value) { return value; }
template <class T>
void pair_rows(const T* even, const T* odd, bf16* line) {
  for (int64_t c = 0; c < kStrip; ++c) {
    bf16* pair = line + c / kTile * kTileElements + c % kTile * 2;
    pair[0] = as_bf16(even[c]);
    pair[1] = as_bf16(odd[c]);
  }
}

inline void pair_halves(const float* even, const float* odd, bf16* highs, bf16* odd_highs, bf16* lows) {
  for (int64_t c = 0; c < kTile; ++c) {
    const Halves left = split(even[c]), right = split(odd[c]);
    highs[2 * c] = highs[2 * c + 1] = left.high;
    odd_highs[2 * c] = odd_highs[2 * c + 1] = right.high;
    lows[2 * c] = left.low;
    lows[2 * c + 1] = right.low;
  }
}

template <bool Bf16>
void pack_lora(const LoraView<Bf16>& lora, int64_t k, int64_t ks, int64_t rank, int64_t ranks, bf16* tile) {
  std::memset(tile, 0, kTileElements * sizeof(bf16));
  for (int64_t i = 0; i < ks; ++i)
    for (int64_t j = 0; j < ranks; ++j) {
      const Halves halves = split(lora.at(k + i, rank + j));
      bf16* at = tile + i / 2 * kKStep + i % 2 + 2 * j;
      at[0] = halves.high;
      if constexpr (!Bf16) at[kTile] = halves.low;
    }
}

#endif

}  // namespace jitmoe
