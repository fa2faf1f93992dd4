// Products of tiles: TDPBF16PS multiplies a tile of 16 rows x 32 k by a tile of 32 k x 16 columns of pairs.
//
//                           left b (tmm6)     right b (tmm7)        one block of pairs, 32 k
//     top a    (tmm4)  ->     tmm0              tmm1                rows 0..15
//     bottom a (tmm5)  ->     tmm2              tmm3                the rest, 1..16: 4 loads for 4 products
//
// The sums are tiles of 32 float32 columns: zero, or read where they begin, and written after the whole contraction. A
// block of up to 16 rows uses the bottom half alone. So configurations differ only in the rows of the bottom tiles, and
// no product works on rows that do not exist.
//
// The instruction flushes denormal operands and results to zero. A row's bits do not depend on the rows beside it.
#pragma once
#include "gemm/interface.hpp"
#include "gemm/tiles.hpp"

namespace jitmoe {

// Bottom rows -> configuration. Tiles 0, 1, 4 are the top, 2, 3, 5 the bottom, 6, 7 the right operands.
struct TileConfigurations {
  amx::Configuration of[amx::kRows + 1] = {};
  constexpr TileConfigurations() {
    for (int rows = 1; rows <= amx::kRows; ++rows) {
      of[rows].palette = 1;
      for (int tile = 0; tile < 8; ++tile) {
        of[rows].row_bytes[tile] = amx::kRowBytes;
        of[rows].rows[tile] = static_cast<uint8_t>(tile == 2 || tile == 3 || tile == 5 ? rows : amx::kRows);
      }
    }
  }
};
inline constexpr TileConfigurations kTileConfigurations;

// Bottom rows that this thread's tiles are configured for; 0 outside a parallel region, where the tiles are not ours.
inline constinit thread_local int64_t configured_rows = 0;

inline void configure_tiles(int64_t bottom_rows) {
  if (configured_rows == bottom_rows) return;
  amx::load_configuration(kTileConfigurations.of[bottom_rows]);
  configured_rows = bottom_rows;
}

inline int64_t bottom_rows(int64_t rows) { return (rows - 1) % amx::kRows + 1; }

inline constexpr int64_t kStripBytes = kStrip * sizeof(float);

template <int Tile>
void begin_tile(const SumStart& start, int64_t row, int64_t column) {
  if (start.from == kZeros) return amx::zero<Tile>();
  amx::load<Tile>(start.from + row * start.stride + column, start.stride * sizeof(float));
}

// One step of the contraction: `a` is the left operand, the top tile and behind it the bottom one, or the bottom one
// alone; `b` one or two tiles of pairs.
template <bool Top, int Columns>
void step_tiles(const bf16* a, const bf16* b) {
  if constexpr (Top) amx::load<4>(a, amx::kRowBytes);
  amx::load<5>(Top ? a + kTileElements : a, amx::kRowBytes);
  amx::stream<6>(b, amx::kRowBytes);
  if constexpr (Top) amx::multiply_add<0, 4, 6>();
  amx::multiply_add<2, 5, 6>();
  if constexpr (Columns == 2) {
    amx::stream<7>(b + kTileElements, amx::kRowBytes);
    if constexpr (Top) amx::multiply_add<1, 4, 7>();
    amx::multiply_add<3, 5, 7>();
  }
}

template <bool Top, int Columns, class Steps>
void multiply_tiles(const SumStart& start, float* c, Steps&& steps) {
  constexpr int64_t below = Top ? amx::kRows : 0;
  float* bottom = c + below * kStrip;
  if constexpr (Top) begin_tile<0>(start, 0, 0);
  if constexpr (Top && Columns == 2) begin_tile<1>(start, 0, kTile);
  begin_tile<2>(start, below, 0);
  if constexpr (Columns == 2) begin_tile<3>(start, below, kTile);
  steps([](const bf16* a, const bf16* b) { step_tiles<Top, Columns>(a, b); });
  if constexpr (Top) amx::store<0>(c, kStripBytes);
  if constexpr (Top && Columns == 2) amx::store<1>(c + kTile, kStripBytes);
  amx::store<2>(bottom, kStripBytes);
  if constexpr (Columns == 2) amx::store<3>(bottom + kTile, kStripBytes);
}

// c [rows, 16 Columns] = start + the sum of the steps, for up to 32 rows. `steps` calls its argument as
// step_tiles(a, b) for each step. LoRA of `start` is a step like others, and not taken from it.
template <int Columns, class Steps>
void multiply_block(int64_t rows, const SumStart& start, float* c, Steps&& steps) {
  configure_tiles(bottom_rows(rows));
  if (rows > amx::kRows) return multiply_tiles<true, Columns>(start, c, steps);
  multiply_tiles<false, Columns>(start, c, steps);
}

}  // namespace jitmoe
