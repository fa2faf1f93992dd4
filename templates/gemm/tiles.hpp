// The tile instructions of AMX, one function each. The compilers' intrinsics have two faults: GCC's are macros that
// need the tile's number as text, which a template argument is not; and their loads do not say that they read memory,
// so of "fill, load, refill, load" the first fill is dropped.
#pragma once
#include <cstdint>

namespace jitmoe::amx {

inline constexpr int64_t kRows = 16;  // of a whole tile
inline constexpr int64_t kRowBytes = 64;

// The operand of LDTILECFG: rows and bytes of a row of each of the eight tiles.
struct alignas(64) Configuration {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

inline void load_configuration(const Configuration& configuration) {
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
}

inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int Tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile) : "memory");
}

template <int Tile>
inline void load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}

// A load with a hint: the lines will not be read from L1 again soon.
template <int Tile>
inline void stream(const void* rows, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}

// c += a . b for rows of pairs of bfloat16.
template <int C, int A, int B>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}

}  // namespace jitmoe::amx
