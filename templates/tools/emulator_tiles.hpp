// Tiles of each thread, counters, and the execution of the AMX instructions. Belongs to emulator.cpp alone.
//
//   LDTILECFG -> state of the thread {start_row, 8 tiles} -> loads, products, stores -> TILERELEASE
#pragma once
#include <immintrin.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#include "bf16.hpp"
#include "tools/emulator_decode.hpp"

namespace jitmoe::emulator {
namespace {

alignas(64) std::atomic<uint64_t> counters[static_cast<int>(Count::kNumber)];

void count(Count what, uint64_t amount = 1) {
  counters[static_cast<int>(what)].fetch_add(amount, std::memory_order_relaxed);
}

// State: tiles of each thread

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// Bytes outside a tile's shape may hold anything, as no instruction shows them.
struct Tile {
  uint8_t rows, row_bytes;
  alignas(64) uint8_t row[kRows][kRowBytes];
  bool valid() const { return rows != 0; }
};

struct TileState {
  std::atomic<bool> taken;
  uint8_t start_row;
  Tile tile[kTiles];
};

// A thread takes a state at LDTILECFG and frees it at TILERELEASE, because a signal handler cannot allocate. These are
// 9 MB of zero pages, of which only a few are ever touched.
constexpr int kStates = 1024;
TileState states[kStates];

// One pointer of initial-exec TLS: the dynamic model may call malloc at a thread's first access, which a
// signal handler must not, and the static block that dlopen can use has no room for the tiles themselves.
[[gnu::tls_model("initial-exec")]] constinit thread_local TileState* tiles = nullptr;

TileState* take_state() {
  for (TileState& state : states)
    if (!state.taken.exchange(true, std::memory_order_acquire)) return &state;
  return nullptr;
}

void release_tiles() {
  if (tiles) tiles->taken.store(false, std::memory_order_release);
  tiles = nullptr;
}

// Execute: tiles

bool refuse(Machine& machine, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(machine.reason, sizeof machine.reason, format, arguments);
  va_end(arguments);
  return false;
}

// Finds the tile of an operand; null after a refusal.
Tile* find_tile(Machine& machine, int number) {
  if (!tiles)
    refuse(machine,
           "#UD, no tiles are configured on this thread (LDTILECFG missing, or use after TILERELEASE)");
  else if (number >= kTiles)
    refuse(machine, "#UD, tmm%d does not exist", number);
  else if (!tiles->tile[number].valid())
    refuse(machine, "#UD, tmm%d has no rows in the configuration", number);
  else
    return &tiles->tile[number];
  return nullptr;
}

bool is_zero(const uint8_t* bytes, int first, int last) {
  for (int i = first; i <= last; ++i)
    if (bytes[i]) return false;
  return true;
}

// Offsets in the 64 bytes of a tile configuration.
constexpr int kPalette = 0, kStartRow = 1, kColumnBytes = 16, kRowCounts = 48;

bool check_configuration(Machine& machine, const uint8_t* config) {
  if (config[kPalette] > 1) return refuse(machine, "#GP, palette %d does not exist", config[kPalette]);
  if (config[kPalette] == 0) return true;
  if (!is_zero(config, 2, 15) || !is_zero(config, 32, 47) || !is_zero(config, 56, 63))
    return refuse(machine, "#GP, reserved bytes of the configuration are not zero");
  for (int i = 0; i < kTiles; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + kColumnBytes + 2 * i, 2);
    const int rows = config[kRowCounts + i];
    if (rows > kRows || row_bytes > kRowBytes || (rows == 0) != (row_bytes == 0))
      return refuse(machine, "#GP, tmm%d cannot have %d rows of %d bytes", i, rows, row_bytes);
  }
  return true;
}

bool load_configuration(Machine& machine, const Instruction& instruction) {
  uint8_t config[64];
  memcpy(config, instruction.memory, sizeof config);
  if (!check_configuration(machine, config)) return false;
  if (config[kPalette] == 0) {
    release_tiles();
    return true;
  }
  if (!tiles) tiles = take_state();
  if (!tiles)
    return refuse(machine, "more than %d threads hold tiles at once: is TILERELEASE missing?", kStates);
  tiles->start_row = config[kStartRow];
  for (int i = 0; i < kTiles; ++i) {
    tiles->tile[i] = Tile{};
    tiles->tile[i].rows = config[kRowCounts + i];
    tiles->tile[i].row_bytes = config[kColumnBytes + 2 * i];
  }
  return true;
}

bool store_configuration(Machine&, const Instruction& instruction) {
  uint8_t config[64] = {};
  if (tiles) {
    config[kPalette] = 1;
    config[kStartRow] = tiles->start_row;
    for (int i = 0; i < kTiles; ++i) {
      config[kRowCounts + i] = tiles->tile[i].rows;
      config[kColumnBytes + 2 * i] = tiles->tile[i].row_bytes;
    }
  }
  memcpy(instruction.memory, config, sizeof config);
  return true;
}

bool release(Machine&, const Instruction&) {
  release_tiles();
  return true;
}

bool zero_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_tile(machine, instruction.reg);
  if (!tile) return false;
  memset(tile->row, 0, sizeof tile->row);
  tiles->start_row = 0;
  return true;
}

// Common to loads and stores: null after a refusal.
Tile* find_memory_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_tile(machine, instruction.reg);
  if (!tile) return nullptr;
  if (tile->row_bytes % 4 == 0 && tiles->start_row < tile->rows) return tile;
  refuse(machine, "#UD, tmm%d has %d rows of %d bytes and start_row is %d", instruction.reg, tile->rows,
         tile->row_bytes, tiles->start_row);
  return nullptr;
}

bool load_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_memory_tile(machine, instruction);
  if (!tile) return false;
  for (int64_t m = tiles->start_row; m < tile->rows; ++m)
    memcpy(tile->row[m], instruction.memory + m * instruction.stride, tile->row_bytes);
  tiles->start_row = 0;
  return true;
}

bool store_tile(Machine& machine, const Instruction& instruction) {
  Tile* tile = find_memory_tile(machine, instruction);
  if (!tile) return false;
  for (int64_t m = tiles->start_row; m < tile->rows; ++m)
    memcpy(instruction.memory + m * instruction.stride, tile->row[m], tile->row_bytes);
  tiles->start_row = 0;
  return true;
}

// c[m, n] += Σ_k a[m, k] b[k, n]; one k is a 32-bit lane of two bfloat16 or four bytes.
struct Product {
  Tile *c, *a, *b;
};

bool find_product(Machine& machine, const Instruction& instruction, Product& product) {
  const int c = instruction.reg, a = instruction.rm, b = instruction.vvvv;
  if (!(product.c = find_tile(machine, c)) || !(product.a = find_tile(machine, a)) ||
      !(product.b = find_tile(machine, b)))
    return false;
  if (c == a || c == b || a == b)
    return refuse(machine, "#UD, tmm%d, tmm%d, tmm%d are not different", c, a, b);
  const Tile &tc = *product.c, &ta = *product.a, &tb = *product.b;
  if (tc.row_bytes % 4 == 0 && ta.row_bytes % 4 == 0 && tc.rows == ta.rows && tc.row_bytes == tb.row_bytes &&
      ta.row_bytes / 4 == tb.rows)
    return true;
  return refuse(machine, "#UD, rows x bytes do not fit: C tmm%d %dx%d, A tmm%d %dx%d, B tmm%d %dx%d", c,
                tc.rows, tc.row_bytes, a, ta.rows, ta.row_bytes, b, tb.rows, tb.row_bytes);
}

void finish_product(const Product& product, int terms) {
  tiles->start_row = 0;
  count(Count::kUsefulRows, product.a->rows);
  count(Count::kUsefulFlop,
        uint64_t{2} * terms * product.a->rows * product.b->rows * (product.c->row_bytes / 4));
}

// Even and odd elements are two chains of fused multiply-adds over k; then even + odd, then + C. All 16
// columns are computed; nobody reads those outside the tile.
__attribute__((target("avx2,fma"))) bool tdpbf16ps(Machine& machine, const Instruction& instruction) {
  Product product;
  if (!find_product(machine, instruction, product)) return false;
  alignas(32) float even_b[kRows][16], odd_b[kRows][16];
  for (int k = 0; k < product.b->rows; ++k)
    for (int n = 0; n < 16; n += 8) {
      const __m256i pairs = _mm256_load_si256(reinterpret_cast<__m256i*>(product.b->row[k] + 4 * n));
      const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
      _mm256_store_ps(even_b[k] + n, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
      _mm256_store_ps(odd_b[k] + n, _mm256_castsi256_ps(odd));
    }
  for (int m = 0; m < product.a->rows; ++m) {
    uint16_t a[2 * kRows];
    memcpy(a, product.a->row[m], sizeof a);
    __m256 even[2] = {}, odd[2] = {};
    for (int k = 0; k < product.b->rows; ++k) {
      const __m256 even_a = _mm256_set1_ps(to_float(a[2 * k])),
                   odd_a = _mm256_set1_ps(to_float(a[2 * k + 1]));
      for (int half = 0; half < 2; ++half) {
        even[half] = _mm256_fmadd_ps(even_a, _mm256_load_ps(even_b[k] + 8 * half), even[half]);
        odd[half] = _mm256_fmadd_ps(odd_a, _mm256_load_ps(odd_b[k] + 8 * half), odd[half]);
      }
    }
    float* c = reinterpret_cast<float*>(product.c->row[m]);
    for (int half = 0; half < 2; ++half)
      _mm256_store_ps(c + 8 * half,
                      _mm256_add_ps(_mm256_load_ps(c + 8 * half), _mm256_add_ps(even[half], odd[half])));
  }
  finish_product(product, 2);
  return true;
}

// The four integer products differ only in the sign of their bytes. The sums wrap.
template <typename A, typename B>
__attribute__((target("avx2"))) bool tdp_bytes(Machine& machine, const Instruction& instruction) {
  Product product;
  if (!find_product(machine, instruction, product)) return false;
  for (int m = 0; m < product.a->rows; ++m) {
    uint32_t sums[16];
    memcpy(sums, product.c->row[m], sizeof sums);
    for (int k = 0; k < product.b->rows; ++k)
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < 4; ++i)
          sums[n] +=
              static_cast<A>(product.a->row[m][4 * k + i]) * static_cast<B>(product.b->row[k][4 * n + i]);
    memcpy(product.c->row[m], sums, sizeof sums);
  }
  finish_product(product, 4);
  return true;
}

}  // namespace
}  // namespace jitmoe::emulator
