// Packed blocks for products of pairs of bfloat16: with pairs along the outputs, over which backward contracts, and
// without what lies outside the matrix.
#pragma once
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "gemm/interface.hpp"

namespace jitmoe {

#ifdef __AVX512BW__

inline void transpose_qwords(__m512i (&row)[8]) {
  __m512i next[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    next[i] = _mm512_unpacklo_epi64(row[i], row[i + 1]);
    next[i + 1] = _mm512_unpackhi_epi64(row[i], row[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i a = _mm512_shuffle_i64x2(next[i], next[i + 2], 0x88);
    const __m512i b = _mm512_shuffle_i64x2(next[i], next[i + 2], 0xdd);
    const __m512i c = _mm512_shuffle_i64x2(next[i + 4], next[i + 6], 0x88);
    const __m512i d = _mm512_shuffle_i64x2(next[i + 4], next[i + 6], 0xdd);
    row[i] = _mm512_shuffle_i64x2(a, c, 0x88);
    row[i + 2] = _mm512_shuffle_i64x2(b, d, 0x88);
    row[i + 4] = _mm512_shuffle_i64x2(a, c, 0xdd);
    row[i + 6] = _mm512_shuffle_i64x2(b, d, 0xdd);
  }
}

// One packed block with pairs along its inputs -> the block with pairs along its outputs: [tile of 16 inputs][output
// pair][input]. The middle halves of each 64-bit lane (two outputs) change places; then follow 8 x 8 transposes of
// 64-bit lanes.
//
//     two outputs:  [a0 a1][b0 b1] -> [a0 b0][a1 b1]       0, 1: even and odd input of the pair
inline void pair_outputs(const bf16* block, bf16* paired) {
  const __m512i swap =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int64_t outs = 0; outs < 2; ++outs)
    for (int64_t ins = 0; ins < 2; ++ins) {
      const bf16* from = block + outs * kTileElements + ins * kTileElements / 2;
      bf16* to = paired + ins * kTileElements + outs * kTileElements / 2;
      __m512i row[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) row[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + i * kKStep), swap);
      transpose_qwords(row);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm512_storeu_si512(to + i * kKStep, row[i]);
    }
}

// Copies a block of pairs with zeros behind the first `count` values of its contraction, whatever the padding holds.
// `block` may be `cut`.
inline void cut_pairs(const bf16* block, int64_t count, bf16* cut) {
  for (int64_t tile = 0; tile < kBlockElements; tile += kTileElements)
    for (int64_t pair = 0; pair < kKStep / 2; ++pair) {
      const int64_t left = count - 2 * pair;
      const __m512i inside = _mm512_set1_epi32(left >= 2 ? -1 : left == 1 ? 0xffff : 0);
      const int64_t at = tile + pair * kKStep;
      _mm512_storeu_si512(cut + at, _mm512_and_si512(_mm512_loadu_si512(block + at), inside));
    }
}

#else

inline void pair_outputs(const bf16* block, bf16* paired) {
  for (int64_t out = 0; out < kStrip; ++out)
    for (int64_t in = 0; in < kKStep; ++in) paired[pair_at(in, out)] = block[pair_at(out, in)];
}

inline void cut_pairs(const bf16* block, int64_t count, bf16* cut) {
  for (int64_t at = 0; at < kBlockElements; ++at)
    cut[at] = at % kTileElements / kKStep * 2 + at % 2 < count ? block[at] : bf16{0};
}

#endif

}  // namespace jitmoe
