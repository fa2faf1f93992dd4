// The packed layout of gemm/interface.hpp, written and read back: canonical [out, in] <-> strips of tiles.
#pragma once
#include <cstring>

#include "gemm/interface.hpp"

namespace jitmoe {

constexpr int64_t packed_elements(int64_t out, int64_t in) {
  return ceil_div(out, kStrip) * ceil_div(in, kKStep) * kBlockElements;
}

// Part of a tile inside the matrix. A tile is 16 outputs x 32 inputs of W, with a 32-bit lane for each pair of inputs.
struct TileExtent {
  int64_t outs;
  int64_t ins;
  bool whole() const { return outs == kTile && ins == kKStep; }
};

inline void pack_tile(const bf16* source, int64_t stride, TileExtent extent, bf16* tile) {
  for (int64_t lane = 0; lane < kTile; ++lane)
    for (int64_t in = 0; in < kKStep; ++in)
      tile[in / 2 * kKStep + lane * 2 + in % 2] =
          lane < extent.outs && in < extent.ins ? source[lane * stride + in] : bf16{0};
}

inline void pack_whole_tile(const bf16* source, int64_t stride, bf16* tile) {
  for (int64_t lane = 0; lane < kTile; ++lane)
    for (int64_t pair = 0; pair < kKStep / 2; ++pair)
      std::memcpy(tile + pair * kKStep + lane * 2, source + lane * stride + pair * 2, 2 * sizeof(bf16));
}

inline void unpack_tile(const bf16* tile, TileExtent extent, bf16* target, int64_t stride) {
  for (int64_t lane = 0; lane < extent.outs; ++lane)
    for (int64_t in = 0; in < extent.ins; ++in)
      target[lane * stride + in] = tile[in / 2 * kKStep + lane * 2 + in % 2];
}

// Visits the tiles of `experts` matrices as visit(canonical offset, packed offset, extent). Strips share nothing, so
// they run in parallel.
template <class Visit>
void for_each_tile(int64_t experts, int64_t out, int64_t in, int64_t threads, Visit&& visit) {
  const int64_t strips = ceil_div(out, kStrip);
  const int64_t strip_elements = packed_elements(kStrip, in);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t item = 0; item < experts * strips; ++item)
    for (int64_t tile = 0; tile < strip_elements / kTileElements; ++tile) {
      const int64_t o = item % strips * kStrip + tile % 2 * kTile;
      const int64_t i = tile / 2 * kKStep;
      const int64_t outs = smaller(kTile, out > o ? out - o : 0);
      visit((item / strips * out + o) * in + i, item * strip_elements + tile * kTileElements,
            TileExtent{outs, smaller(kKStep, in - i)});
    }
}

inline void pack(const bf16* canonical, bf16* packed, int64_t experts, int64_t out, int64_t in,
                 int64_t threads) {
  for_each_tile(experts, out, in, threads, [&](int64_t from, int64_t to, TileExtent extent) {
    if (extent.whole())
      pack_whole_tile(canonical + from, in, packed + to);
    else
      pack_tile(canonical + from, in, extent, packed + to);
  });
}

inline void unpack(const bf16* packed, bf16* canonical, int64_t experts, int64_t out, int64_t in,
                   int64_t threads) {
  for_each_tile(experts, out, in, threads, [&](int64_t to, int64_t from, TileExtent extent) {
    unpack_tile(packed + from, extent, canonical + to, in);
  });
}

}  // namespace jitmoe
