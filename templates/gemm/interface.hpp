// The interface of the matrix back ends, and the one packed layout of the weights that all of them read.
//
// W[out, in] of one expert is cut into strips of 32 outputs; a strip is contiguous, so the forward pass
// streams it from memory once, front to back:
//
//              block 0 (in 0..31)      block 1 (in 32..63)
//   strip 0   [tile 0 | tile 1]       [tile 0 | tile 1]       ...        tile 0: out 0..15
//   strip 1   [tile 0 | tile 1]       ...                               tile 1: out 16..31
//
//   one tile, 1 KB:   out    0        1       ...     15
//     in  0, 1           [w00 w01] [w10 w11]  ...  [wf0 wf1]     consecutive pairs along `in` share a
//     in  2, 3           [w02 w03] [w12 w13]  ...  [wf2 wf3]     32-bit lane: the operand of TDPBF16PS and
//      ...                                                       VDPBF16PS, and two float32 vectors after
//     in 30, 31          [ ...   ]                               one shift and one mask
//
// Sizes that are no multiple of 32 are padded with zeros, which no kernel ever multiplies with a row
// of another token. Backward contracts over `out` and reads the same tiles; there is no second copy.
//
// The rows of one expert (a segment) are cut into row blocks of at most m_step rows, sized evenly. A
// panel is the left operand of a product: row block after row block, each in the order its back end
// reads. A strip of results is row-major float32 [rows, 32].
//
// Every back end is a class template `Gemm...<S>` with these static functions:
//
//   block_elements(k)                                       Operands of one row block
//   pack_rows(rows, stride, count, k, block)                rows of bfloat16, zero up to a multiple of 32,
//                                                           -> one row block
//   pack_strip(strip, count, column, columns, k, block)     32 columns of a strip -> those of a row block
//   forward(panel, rows, k, weights, start, strip, scratch)
//                                                           strip = start + panel [rows, k] . W[32 outputs, k]^T
//   backward(panel, rows, n, weights, start, strip, scratch)
//                                                           strip = start + panel [rows, n] . W[n, 32 inputs]
//   column_at(lane)                                         which column of its strip backward keeps in a lane ...
//   settle(strip, rows)                                     ... until they are put into natural order
//   low_rank(block, rows, k, lora, rank, low)               low [rank, m_step] = block . lora
//   outer(a, a_stride, rows, b, k, c)                       c [rows, 32] += a [k, rows]^T . b [k, 32]
//   turn<Padded>(from, stride, rows, columns, to, stride)   to [columns, rows] = from [rows, columns]^T of float32;
//                                                           padded with zeros up to 32 rows
#pragma once
#include <type_traits>

#include "bf16.hpp"
#include "shape.hpp"

namespace jitmoe {

inline constexpr int64_t kTileElements = kTile * kKStep;
inline constexpr int64_t kBlockElements = kStrip * kKStep;

// Elements of the expanded weights that one thread keeps: 256 columns of the contraction x 32 outputs of
// float32 are 32 KB, half of the smallest L2 share and close to L1.
inline constexpr int64_t kChunk = 256;

// Even cut of the rows of a segment into row blocks of at most m_step: 15 rows at m_step 14 are 8 + 7,
// because a block of one row is bound by the latency of its additions. Where m_step is whole tiles of 16
// rows so is each block but the last, so that one tile at most is not full.
struct RowBlocks {
  int64_t rows;
  int64_t count;
  int64_t unit;
  RowBlocks(int64_t rows, int64_t m_step)
      : rows(rows), count(ceil_div(rows, m_step)), unit(m_step % kTile ? 1 : kTile) {}
  int64_t begin(int64_t block) const { return smaller(rows, block * ceil_div(rows, unit) / count * unit); }
  int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
};

// The packed blocks of 2 KB that one product contracts over, `stride` elements apart: neighbours in forward,
// one of each strip in backward. `next` is the first block of the product that this thread will do after it.
struct Weights {
  const bf16* blocks;
  const bf16* next;
  int64_t stride;
  const bf16* block(int64_t index) const { return blocks + index * stride; }
  // The same, counted on into the product after this one of `all` blocks; null where there is none.
  const bf16* later(int64_t index, int64_t all) const {
    return index < all ? block(index) : next ? next + (index - all) * stride : nullptr;
  }
};

// What the sums of a product begin with: zero or the values in the strip, and the LoRA K-step, low-rank
// columns of the rows [blocks, rank, m_step] times [rank, 32] of a LoRA matrix.
struct Start {
  bool zero;
  const float* low;
  const float* lora;
  int64_t rank;
};

// Ask for one line, and for some lines of packed weights. Not the builtin: GCC 12 takes a function of nothing but
// prefetches for one without effect, and drops the call.
inline void prefetch_to_l1(const bf16* line) { asm volatile("prefetcht0 %0" : : "m"(*line)); }
inline void prefetch_to_l2(const bf16* lines, int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(bf16);
  for (int64_t i = 0; i < elements; i += kLine) asm volatile("prefetcht1 %0" : : "m"(lines[i]));
}

// Brings the next chunk of weights into the L2 cache while the row blocks sweep over the present one: for
// each block that a sweep reads it fetches the block of the next chunk at the same place, in full where
// there is one sweep, else a part in each of the first two or four.
class Ahead {
 public:
  Ahead(const Weights& weights, int64_t first_block, int64_t chunk_blocks, int64_t all_blocks, int64_t sweeps)
      : chunk_(first_block + chunk_blocks < all_blocks ? weights.block(first_block + chunk_blocks)
                                                       : weights.next),
        stride_(weights.stride),
        parts_(sweeps >= 4 ? 4 : smaller(sweeps, 2)) {}

  void fetch(int64_t sweep, int64_t block) const {
    if (!chunk_ || sweep >= parts_) return;
    const int64_t elements = kBlockElements / parts_;
    prefetch_to_l2(chunk_ + block * stride_ + sweep * elements, elements);
  }

 private:
  const bf16* chunk_;
  int64_t stride_;
  int64_t parts_;
};

// What a back end sets up on each thread for the time of a parallel region; most need nothing.
template <class Gemm>
struct ThreadState {};

// A LoRA matrix read as [k, rank], whichever of the two is contiguous.
template <bool Bf16>
struct LoraView {
  using Element = std::conditional_t<Bf16, bf16, float>;
  const Element* data;
  int64_t k_stride;
  int64_t rank_stride;
  float at(int64_t k, int64_t r) const { return load_lora(data + k * k_stride + r * rank_stride); }
};

}  // namespace jitmoe
