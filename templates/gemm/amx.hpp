// AMX: TDPBF16PS multiplies a tile of 16 rows x 32 k by a tile of 32 k x 16 columns of pairs. It reads packed weights
// as they are. Row blocks are its left operands: for each 32 k, the tile of rows 0..15 and, where m_step is 32, behind
// it the tile of rows 16..31, 1 KB each and contiguous. k is padded with zeros to 32.
//
//                           left b (tmm6)     right b (tmm7)        one packed block, 32 k
//     top a    (tmm4)  ->     tmm0              tmm1                rows 0..15
//     bottom a (tmm5)  ->     tmm2              tmm3                the rest, 1..16: 4 loads for 4 products
//
// The sums are tiles of the strip itself, read before and written after the whole contraction. A block of up to 16 rows
// uses the bottom half alone. So configurations differ only in the rows of the bottom tiles, and no product works on
// rows that do not exist.
//
// A configuration with a shorter k cannot end the contraction, as LDTILECFG clears all tiles, the sums among them.
// Instead the last block of weights is copied without its padding, which times zero would be a NaN if it held one.
//
// The instruction flushes denormal operands and results to zero. A row's bits do not depend on the rows beside it.
#pragma once
#include "gemm/avx512.hpp"
#include "gemm/pair.hpp"
#include "gemm/tiles.hpp"

namespace jitmoe {

// Bottom rows -> configuration. Tiles 0, 1, 4 are the top, 2, 3, 5 the bottom, 6, 7 the weights.
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

template <Shape S>
struct GemmAmx {
  using Operand = bf16;
  using V = Simd512;
  using Vectors = VectorBlock<most_rows(Isa::avx512), V>;
  static constexpr int64_t kTiles = S.m_step / amx::kRows;  // of a row block, side by side
  static constexpr int64_t kStripBytes = kStrip * sizeof(float);
  static constexpr auto& outer = Vectors::outer;
  static constexpr auto& transpose = Vectors::template transpose<false>;
  static constexpr auto& transpose_padded = Vectors::template transpose<true>;

  static int64_t block_elements(int64_t k) { return ceil_div(k, kKStep) * kTiles * kTileElements; }

  // Row `row` of the tile that holds `column`.
  static Operand* row_of(Operand* block, int64_t row, int64_t column) {
    return block + (column / kKStep * kTiles + row / amx::kRows) * kTileElements + row % amx::kRows * kKStep;
  }

  static void pack_rows(const bf16* rows, int64_t stride, int64_t count, int64_t k, Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t column = 0; column < k; column += kKStep)
        _mm512_storeu_si512(row_of(block, row, column), V::load_bits(rows + row * stride + column));
  }

  static void pack_strip(const float* strip, int64_t count, int64_t column, int64_t columns, int64_t,
                         Operand* block) {
    for (int64_t row = 0; row < count; ++row)
      _mm512_storeu_si512(row_of(block, row, column), load_rounded(strip + row * kStrip, columns));
  }

  static void forward(const Operand* panel, int64_t rows, int64_t k, const Weights<S>& weights,
                      const SumStart& start, float* strip, float* scratch) {
    begin(rows, start, strip);
    const int64_t whole = k / kKStep;
    auto* room = reinterpret_cast<bf16*>(scratch);
    Pairs<S> pairs(weights);
    const bf16* blocks = pairs.run(0, whole, room);
    bf16* last = blocks == room ? room + whole * kBlockElements : room;
    if (k % kKStep) cut_pairs(pairs.block(whole), k % kKStep, last);
    sweep(panel, rows, weights, {blocks, whole, k % kKStep ? last : nullptr}, strip);
  }

  static void backward(const Operand* panel, int64_t rows, int64_t n, const Weights<S>& weights,
                       const SumStart& start, float* strip, float* scratch) {
    begin(rows, start, strip);
    const int64_t all = ceil_div(n, kKStep);
    auto* paired = reinterpret_cast<bf16*>(scratch);
    Pairs<S> pairs(weights);
    for (int64_t i = 0; i < all; ++i) pair_outputs(pairs.block(i), paired + i * kBlockElements);
    bf16* last = paired + n / kKStep * kBlockElements;
    if (n % kKStep) cut_pairs(last, n % kKStep, last);
    sweep(panel, rows, weights, {paired, all, nullptr}, strip);
  }

  static int64_t column_at(int64_t lane) { return lane; }
  static void to_natural_order(float*, int64_t) {}

  // The LoRA matrix is paired on the way, 32 ranks and one chunk of k at a time.
  static void low_rank(const Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora,
                       int64_t rank, float* low) {
    constexpr int64_t kLoraChunk = kAmxTuning.lora_chunk;
    alignas(64) bf16 pairs[kLoraChunk * kStrip];
    alignas(64) float product[S.m_step * kStrip];
    for (int64_t r = 0; r < rank; r += kStrip) {
      const int64_t ranks = smaller(kStrip, rank - r);
      for (float& value : product) value = 0.0f;
      for (int64_t first = 0; first < k; first += kLoraChunk) {
        const int64_t count = smaller(kLoraChunk, k - first);
        for (int64_t i = 0; i < count; i += kKStep)
          for (int64_t tile = 0; tile < ranks; tile += kTile)
            pack_lora(lora, first + i, smaller(kKStep, k - first - i), r + tile, smaller(kTile, ranks - tile),
                      pairs + i * kStrip + tile * kKStep);
        const Operand* a = block + first / kKStep * kTiles * kTileElements;
        const Right right{pairs, ceil_div(count, kKStep), nullptr};
        if (ranks > kTile)
          multiply_block<2>(a, rows, right, [](int64_t) {}, product);
        else
          multiply_block<1>(a, rows, right, [](int64_t) {}, product);
      }
      for (int64_t j = 0; j < ranks; ++j)
        for (int64_t row = 0; row < rows; ++row) low[(r + j) * S.m_step + row] = product[row * kStrip + j];
    }
  }

 private:
  // The LoRA K-step is done in float32 vectors: most adapters have a rank that fills a quarter of a tile.
  static void begin(int64_t rows, const SumStart& start, float* strip) {
    if (start.from != strip)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < kStrip; c += V::kLanes)
          V::store(strip + row * kStrip + c, V::load(start.from + row * start.stride + c));
    const RowBlocks blocks(rows, S.m_step);
    for (int64_t b = 0; start.rank && b < blocks.count; ++b)
      outer(start.low + b * start.rank * S.m_step, S.m_step, blocks.size(b), start.lora, start.rank,
            strip + blocks.begin(b) * kStrip);
  }

  // The right operand of a product: `whole` consecutive blocks of pairs and, unless null, the block `last`.
  struct Right {
    const bf16* blocks;
    int64_t whole;
    const bf16* last;
  };

  // Row blocks share nothing, so the last, partial one comes first where its configuration is still loaded: each strip
  // then changes the configuration once instead of twice.
  static void sweep(const Operand* panel, int64_t rows, const Weights<S>& weights, const Right& right,
                    float* strip) {
    const RowBlocks blocks(rows, S.m_step);
    const int64_t all = right.whole + (right.last ? 1 : 0);
    const NextChunk<S> next(weights, 0, all, all, blocks.count);
    const int64_t last = blocks.count - 1;
    const int64_t start = configured_rows == bottom_rows(blocks.size(last)) ? last : 0;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t b = (start + i) % blocks.count;
      multiply_block<2>(
          panel + b * all * kTiles * kTileElements, blocks.size(b), right,
          [&](int64_t block) { next.fetch(i, block); }, strip + blocks.begin(b) * kStrip);
    }
  }

  static int64_t bottom_rows(int64_t rows) { return (rows - 1) % amx::kRows + 1; }

  // `Columns` tiles of the strip at `c`: c [rows, 16 Columns] += a . right
  template <int Columns, class Fetch>
  static void multiply_block(const Operand* a, int64_t rows, const Right& right, Fetch&& fetch, float* c) {
    configure_tiles(bottom_rows(rows));
    if constexpr (kTiles == 2)
      if (rows > amx::kRows) return multiply<true, Columns>(a, right, fetch, c);
    multiply<false, Columns>(a, right, fetch, c);
  }

  template <bool Top, int Columns, class Fetch>
  static void multiply(const Operand* a, const Right& right, Fetch&& fetch, float* c) {
    float* bottom = Top ? c + amx::kRows * kStrip : c;
    if constexpr (Top) amx::load<0>(c, kStripBytes);
    if constexpr (Top && Columns == 2) amx::load<1>(c + kTile, kStripBytes);
    amx::load<2>(bottom, kStripBytes);
    if constexpr (Columns == 2) amx::load<3>(bottom + kTile, kStripBytes);
    for (int64_t i = 0; i < right.whole; ++i, a += kTiles * kTileElements) {
      fetch(i);
      step<Top, Columns>(a, right.blocks + i * kBlockElements);
    }
    if (right.last) step<Top, Columns>(a, right.last);
    if constexpr (Top) amx::store<0>(c, kStripBytes);
    if constexpr (Top && Columns == 2) amx::store<1>(c + kTile, kStripBytes);
    amx::store<2>(bottom, kStripBytes);
    if constexpr (Columns == 2) amx::store<3>(bottom + kTile, kStripBytes);
  }

  template <bool Top, int Columns>
  static void step(const Operand* a, const bf16* b) {
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

  // 16 ranks x 32 k of a LoRA matrix -> one tile of pairs, zero outside the matrix.
  static void pack_lora(LoraView<S.lora_bf16> lora, int64_t k, int64_t ks, int64_t rank, int64_t ranks,
                        bf16* tile) {
    const auto* corner = lora.data + k * lora.k_stride + rank * lora.rank_stride;
    __m512i row[16];
    if (lora.k_stride == 1) {
      for (int64_t i = 0; i < 16; ++i)
        row[i] = i < ranks ? load_rounded(corner + i * lora.rank_stride, ks) : V::zero_bits();
      V::transpose(row);
    } else if (lora.rank_stride != 1) {  // neighbours on neither axis
      for (int64_t i = 0; i < 16; ++i) {
        typename LoraView<S.lora_bf16>::Element values[kKStep];
        for (int64_t c = 0; i < ranks && c < ks; ++c)
          values[c] = corner[c * lora.k_stride + i * lora.rank_stride];
        row[i] = i < ranks ? load_rounded(values, ks) : V::zero_bits();
      }
      V::transpose(row);
    } else {
      for (int64_t i = 0; i < 16; ++i)
        row[i] = interleave(load_half(corner + 2 * i * lora.k_stride, 2 * i < ks ? ranks : 0),
                            load_half(corner + (2 * i + 1) * lora.k_stride, 2 * i + 1 < ks ? ranks : 0));
    }
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kKStep, row[i]);
  }

  // The first `count` of 32 values as bfloat16, then zeros.
  static __m512i load_rounded(const float* values, int64_t count) {
    const __m512 low = V::load_some(values, smaller(count, 16));
    const __m512 high = V::load_some(values + 16, count > 16 ? count - 16 : 0);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
  static __m512i load_rounded(const bf16* values, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), values);
  }

  // The first `count` of 16 values as bfloat16, then zeros.
  static __m256i load_half(const float* values, int64_t count) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(V::load_some(values, count)));
  }
  static __m256i load_half(const bf16* values, int64_t count) {
    return _mm256_maskz_loadu_epi16(V::first(count), values);
  }

  // even[0] odd[0] even[1] odd[1] ...
  static __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
};

template <Shape S>
  requires(S.isa == Isa::amx)
struct BackEndOf<S> {
  using type = GemmAmx<S>;
};

// A thread holds its tiles from the beginning of a parallel region to the end. Another library may have left a
// configuration before, and finds none of ours after.
template <Shape S>
struct ThreadState<GemmAmx<S>> {
  ThreadState() { configure_tiles(amx::kRows); }
  ~ThreadState() {
    amx::release();
    configured_rows = 0;
  }
  ThreadState(const ThreadState&) = delete;
  ThreadState& operator=(const ThreadState&) = delete;
};

}  // namespace jitmoe
