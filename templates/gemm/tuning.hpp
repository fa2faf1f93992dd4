// The numbers that were tuned, one struct a back end, each with the day and the machine of its measurement. Change one
// only with a new figure.
#pragma once
#include <cstdint>

#include "bf16.hpp"
#include "shape.hpp"

namespace jitmoe {

// Columns of the contraction whose weights are expanded or paired at a time. Expanded to float32, 32 outputs take
// 32 KB: all of the L1 cache of Zen 4, so row blocks read them from L1 and L2. Zen 5, 2026-11-23.
inline constexpr int64_t kChunk = 256;

struct F32Tuning {
  // Most row blocks that expand the weights in registers, each for itself: for so few that is faster than to write and
  // read a panel. Zen 5, 2026-11-23.
  int64_t direct_blocks = 2;
  // Most rows of a block that waits for memory. It reads tile after tile, front to back, which the hardware prefetches
  // better than instructions do (58 against 39 GB/s with two rows on two threads of Zen 4, 2026-11-24).
  int streamed_rows;
  // With more rows: blocks ahead that are brought to L2, and elements ahead that are brought to L1. Zen 4, 2026-11-24.
  int64_t l2_blocks = 16;
  int64_t l1_elements = 4096 / sizeof(bf16);
  // Blocks of other formats that few row blocks decode at a time: half of L1. Not tuned yet.
  int64_t decoded_blocks = 8;
};
inline constexpr F32Tuning kAvx2Tuning{.streamed_rows = 3};
inline constexpr F32Tuning kAvx512Tuning{.streamed_rows = 6};

struct Avx512Bf16Tuning {
  // Blocks of a chunk. Forward: 64 KB of packed weights in L2, 28 KB of x in L1. Backward: 16 KB of pairs and x in L1.
  // Zen 5, 2026-11-23.
  int64_t forward_blocks = 32;
  int64_t backward_blocks = kChunk / kKStep;
  // Most rows that decode other formats in registers, and that leave the codes to the hardware prefetcher; blocks of
  // codes ahead that are brought to L2 with more (55 against 72 ns a block of fp8 with one row). Zen 4, 2026-11-25.
  int direct_rows = 8;
  int streamed_codes = 4;
  int64_t codes_ahead = 16;
  // Blocks of other formats that more rows decode at a time: half of L1, read again at once.
  int64_t decoded_blocks = 8;
  // Most rows of a block that waits for memory, see above (50 against 34 GB/s with five rows on two threads of Zen 4,
  // 2026-11-24).
  int streamed_rows = 8;
  // With more rows: blocks ahead that are brought to L1. A step reads a line of each of two tiles from L2, which the L1
  // prefetcher of Zen 5 does not follow (165 against 334 GFLOP/s at 14 rows, 2026-11-23).
  int64_t l1_blocks = 2;
};
inline constexpr Avx512Bf16Tuning kAvx512Bf16Tuning;

struct AmxTuning {
  // Columns of the contraction for which a LoRA matrix is paired at a time, in 64 KB of stack. Chosen under the
  // emulator, 2026-11-23; never measured.
  int64_t lora_chunk = 1024;
};
inline constexpr AmxTuning kAmxTuning;

}  // namespace jitmoe
