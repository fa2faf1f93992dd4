// The one structural template parameter of every kernel, and the constants of the packed layout.
#pragma once
#include <cstdint>

namespace jitmoe {

enum class Isa { ref, avx2, avx512, avx512_bf16, amx };

// What an instance records about its calls, besides computing them. `nothing` costs nothing.
enum class Watch { nothing, time, memory, values };

struct Shape {
  Isa isa;
  int64_t hidden;        // H, width of a token row
  int64_t intermediate;  // I, width between up and down projection
  int64_t padded_rank;   // LoRA rank rounded up to kKStep; 0 without LoRA
  int64_t m_step;        // rows of one register block
  bool lora_bf16;        // LoRA parameters are bfloat16 instead of float32
  Watch watch;           // time: see Lap in parallel.hpp; memory: see checked.hpp; values: see traced.hpp
};

inline constexpr int64_t kKStep = 32;  // columns of a packed block along the contraction
inline constexpr int64_t kStrip = 32;  // output columns of one strip
inline constexpr int64_t kTile = 16;   // output columns of one 1 KB tile, 32-bit lanes of a 64-byte vector

constexpr int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }
constexpr int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <Shape S>
constexpr void check_shape() {
  static_assert(S.hidden > 0 && S.intermediate > 0, "hidden and intermediate sizes must be positive");
  static_assert(S.padded_rank % kKStep == 0, "padded_rank must be a multiple of 32");
  static_assert(
      S.isa == Isa::amx ? S.m_step == 16 || S.m_step == 32 : S.m_step >= 1 && S.m_step <= 14,
      "m_step must be 16 or 32 on AMX: whole tiles; else 1..14: two vectors a row and 32 registers");
}

}  // namespace jitmoe
