// The one structural template parameter of every kernel, and the constants of the packed layout.
#pragma once
#include <cstdint>

namespace jitmoe {

enum class Isa { ref, avx2, amx_avx2, avx512, avx512_bf16, amx };

// amx_avx2 is AMX beside the vectors of AVX2, for the emulator on CPUs without AVX-512.
constexpr bool has_tiles(Isa isa) { return isa == Isa::amx || isa == Isa::amx_avx2; }

// a = activation(gate, up): see activation.hpp.
enum class Activation { silu, silu_clamped, gpt_oss };

// How the frozen weights are kept: see weights/codes.hpp.
enum class Format { bfloat16, fp8_block, fp8_row, int4_group, mxfp4, int8_row };

// The type of their scales; e8m0 is a power of two, its exponent + 127 in a byte.
enum class Scale { none, float32, bfloat16, float16, e8m0 };

// What an instance records about its calls, besides computing them. `nothing` costs nothing.
enum class Watch { nothing, time, memory, values };

struct Shape {
  Isa isa;
  int64_t hidden;        // H, width of a token row
  int64_t intermediate;  // I, width between up and down projection
  int64_t padded_rank;   // LoRA rank rounded up to kKStep; 0 without LoRA
  int64_t m_step;        // rows of one register block
  bool lora_bf16;        // LoRA parameters are bfloat16 instead of float32
  Activation activation;
  bool bias;           // gate, up and down have biases
  Format format;       // of the base weights
  int64_t group_size;  // of int4_group: inputs that share a scale
  Scale scale;
  Watch watch;  // time: see watch/timed.hpp; memory: watch/checked.hpp; values: watch/traced.hpp
};

inline constexpr int64_t kKStep = 32;  // columns of a packed block along the contraction
inline constexpr int64_t kStrip = 32;  // output columns of one strip
inline constexpr int64_t kTile = 16;   // output columns of one 1 KB tile, 32-bit lanes of a 64-byte vector

constexpr int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }
constexpr int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of a register block, two vectors each: beside the sums, its registers hold two vectors of weights and, on AVX2
// and AVX-512, one value of a row. AMX takes whole tiles.
constexpr int64_t most_rows(Isa isa) { return has_tiles(isa) ? 2 * kTile : isa == Isa::avx2 ? 6 : 14; }

// Says in a sentence what is wrong with a shape; whether nothing is.
template <Shape S>
constexpr bool check_shape() {
  constexpr bool sizes = S.hidden > 0 && S.intermediate > 0;
  constexpr bool rank = S.padded_rank >= 0 && S.padded_rank % kKStep == 0;
  constexpr bool rows =
      S.m_step >= 1 && S.m_step <= most_rows(S.isa) && (!has_tiles(S.isa) || S.m_step % kTile == 0);
  constexpr bool group = S.format != Format::int4_group || (S.group_size > 0 && S.group_size % kKStep == 0);
  static_assert(group, "group_size of int4_group must be a positive multiple of 32");
  static_assert(sizes, "hidden and intermediate sizes must be positive");
  static_assert(rank, "padded_rank must be a multiple of 32");
  static_assert(rows,
                "m_step must be 16 or 32 on amx, 1 to 6 on avx2 (16 registers), else 1 to 14 (32 registers)");
  return sizes && rank && rows && group;
}

}  // namespace jitmoe
