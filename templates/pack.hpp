// The packed layout of gemm.hpp, written and read back: canonical [out, in] <-> strips of tiles.
#pragma once
#include "gemm.hpp"

namespace jitmoe {

constexpr int64_t packed_elements(int64_t out, int64_t in) {
  return ceil_div(out, kStrip) * ceil_div(in, kKStep) * kBlockElements;
}

// Visits every element of one strip as visit(packed, out, in, inside): element `packed` of the strip is
// W[out, in] where `inside`, padding elsewhere.
template <class Visit>
void visit_strip(int64_t strip, int64_t out, int64_t in, Visit&& visit) {
  int64_t packed = 0;
  for (int64_t block = 0; block < ceil_div(in, kKStep); ++block)
    for (int64_t tile = 0; tile < 2; ++tile)
      for (int64_t pair = 0; pair < kKStep / 2; ++pair)
        for (int64_t lane = 0; lane < kTile; ++lane)
          for (int64_t half = 0; half < 2; ++half, ++packed) {
            const int64_t o = strip * kStrip + tile * kTile + lane;
            const int64_t i = block * kKStep + pair * 2 + half;
            visit(packed, o, i, o < out && i < in);
          }
}

// `experts` matrices; strips are independent, so threads share nothing.
inline void pack(const bf16* canonical, bf16* packed, int64_t experts, int64_t out, int64_t in, int64_t threads) {
  const int64_t strips = ceil_div(out, kStrip);
  const int64_t strip_elements = packed_elements(kStrip, in);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t item = 0; item < experts * strips; ++item) {
    const bf16* source = canonical + item / strips * out * in;
    bf16* target = packed + item * strip_elements;
    visit_strip(item % strips, out, in,
                [&](int64_t at, int64_t o, int64_t i, bool inside) { target[at] = inside ? source[o * in + i] : 0; });
  }
}

inline void unpack(const bf16* packed, bf16* canonical, int64_t experts, int64_t out, int64_t in, int64_t threads) {
  const int64_t strips = ceil_div(out, kStrip);
  const int64_t strip_elements = packed_elements(kStrip, in);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t item = 0; item < experts * strips; ++item) {
    const bf16* source = packed + item * strip_elements;
    bf16* target = canonical + item / strips * out * in;
    visit_strip(item % strips, out, in, [&](int64_t at, int64_t o, int64_t i, bool inside) {
      if (inside) target[o * in + i] = source[at];
    });
  }
}

}  // namespace jitmoe
