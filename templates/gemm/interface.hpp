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
// A back end is a class template over the shape. `BackEnd` below is its contract, one concept a function.
#pragma once
#include <concepts>
#include <type_traits>

#include "bf16.hpp"
#include "shape.hpp"

namespace jitmoe {

inline constexpr int64_t kTileElements = kTile * kKStep;
inline constexpr int64_t kBlockElements = kStrip * kKStep;

// Even cut of the rows of a segment into row blocks of at most m_step: 15 rows at m_step 14 are 8 + 7,
// because a block of one row is bound by the latency of its additions. Where m_step is whole tiles of 16
// rows so is each block but the last, so that one tile at most is not full.
struct RowBlocks {
  int64_t rows;
  int64_t m_step;
  int64_t count;
  int64_t unit;
  RowBlocks(int64_t rows, int64_t m_step)
      : rows(rows), m_step(m_step), count(ceil_div(rows, m_step)), unit(m_step % kTile ? 1 : kTile) {}
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

alignas(64) inline constexpr float kZeros[kStrip] = {};

// What the sums of a product begin with: those of row r with from[r * stride + column], to which the LoRA K-step is
// added, low-rank columns of the rows [blocks, rank, m_step] times [rank, 32] of a LoRA matrix.
//
//                 from             stride
//     zeros       32 zeros            0       the same for every row
//     bias        32 of the bias      0
//     strip       a strip            32       which may be the one that the product writes
struct SumStart {
  const float* from;
  int64_t stride;
  const float* low = nullptr;
  const float* lora = nullptr;
  int64_t rank = 0;

  static SumStart zeros() { return {kZeros, 0}; }
  static SumStart bias(const float* bias) { return {bias, 0}; }
  static SumStart strip(const float* strip) { return {strip, kStrip}; }
  SumStart with_lora(const float* low, const float* lora, int64_t rank) const {
    return {from, stride, low, lora, rank};
  }
  SumStart of_block(const RowBlocks& blocks, int64_t block) const {
    return {from + blocks.begin(block) * stride, stride, low + block * rank * blocks.m_step, lora, rank};
  }
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
class NextChunk {
 public:
  NextChunk(const Weights& weights, int64_t first_block, int64_t chunk_blocks, int64_t all_blocks,
            int64_t sweeps)
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

// The back end of a shape's instruction set. The header of each back end says that it is the one.
struct NoBackEnd {};
template <Shape S>
struct BackEndOf {
  using type = NoBackEnd;
};

// ---- The contract: `BackEnd` is all of these ----------------------------------------------------------

template <class G>
concept HasOperand = requires { typename G::Operand; };

// The Operands of one row block of width k.
template <class G>
concept SizesRowBlocks = requires(int64_t k) {
  { G::block_elements(k) } -> std::same_as<int64_t>;
};

// `count` rows of bfloat16, `stride` apart and zero up to a multiple of 32 columns -> one row block.
template <class G>
concept PacksRows =
    HasOperand<G> && requires(const bf16* rows, int64_t stride, int64_t count, int64_t k,
                              typename G::Operand* block) { G::pack_rows(rows, stride, count, k, block); };

// The first `columns` columns of a strip -> those from `column` on of a row block.
template <class G>
concept PacksStrips = HasOperand<G> && requires(const float* strip, int64_t count, int64_t column, int64_t k,
                                                typename G::Operand* block) {
  G::pack_strip(strip, count, column, count, k, block);
};

// strip = start + panel [rows, k] . W[32 outputs, k]^T. `scratch` holds what is made of the weights.
template <class G>
concept MultipliesForward =
    HasOperand<G> && requires(const typename G::Operand* panel, int64_t rows, int64_t k,
                              const Weights& weights, const SumStart& start, float* strip,
                              float* scratch) { G::forward(panel, rows, k, weights, start, strip, scratch); };

// strip = start + panel [rows, n] . W[n, 32 inputs], its columns in the order of the lanes, and those of `start`.
template <class G>
concept MultipliesBackward =
    HasOperand<G> && requires(const typename G::Operand* panel, int64_t rows, int64_t n,
                              const Weights& weights, const SumStart& start, float* strip, float* scratch) {
      G::backward(panel, rows, n, weights, start, strip, scratch);
    };

// Which column backward keeps in a lane of its strip, until the strip is put into natural order.
template <class G>
concept OrdersColumns = requires(int64_t lane, float* strip, int64_t rows) {
  { G::column_at(lane) } -> std::same_as<int64_t>;
  G::to_natural_order(strip, rows);
};

// low [rank, m_step] = block [rows, k] . lora [k, rank]
template <class G, Shape S>
concept MultipliesLowRank =
    HasOperand<G> &&
    requires(const typename G::Operand* block, int64_t rows, int64_t k, LoraView<S.lora_bf16> lora,
             int64_t rank, float* low) { G::low_rank(block, rows, k, lora, rank, low); };

// c [rows, 32] += a [k, rows]^T . b [k, 32], of float32.
template <class G>
concept AddsOuterProducts = requires(const float* a, int64_t a_stride, int64_t rows, const float* b,
                                     int64_t k, float* c) { G::outer(a, a_stride, rows, b, k, c); };

// to [columns, rows] = from [rows, columns]^T of float32; padded, with zeros up to 32 rows.
template <class G>
concept Transposes = requires(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  G::transpose(from, stride, rows, columns, to, stride);
  G::transpose_padded(from, stride, rows, columns, to, stride);
};

template <class G, Shape S>
concept BackEnd =
    SizesRowBlocks<G> && PacksRows<G> && PacksStrips<G> && MultipliesForward<G> && MultipliesBackward<G> &&
    OrdersColumns<G> && MultipliesLowRank<G, S> && AddsOuterProducts<G> && Transposes<G>;

// Says in a sentence what a class lacks to be a back end; whether it lacks nothing.
template <class G, Shape S>
constexpr bool check_back_end() {
  static_assert(HasOperand<G>, "a back end needs a type Operand, the elements of its row blocks");
  static_assert(SizesRowBlocks<G>, "a back end needs int64_t block_elements(k)");
  static_assert(PacksRows<G>, "a back end needs pack_rows(rows, stride, count, k, block)");
  static_assert(PacksStrips<G>, "a back end needs pack_strip(strip, count, column, columns, k, block)");
  static_assert(MultipliesForward<G>,
                "a back end needs forward(panel, rows, k, weights, start, strip, scratch)");
  static_assert(MultipliesBackward<G>,
                "a back end needs backward(panel, rows, n, weights, start, strip, scratch)");
  static_assert(OrdersColumns<G>,
                "a back end needs int64_t column_at(lane) and to_natural_order(strip, rows)");
  static_assert(MultipliesLowRank<G, S>, "a back end needs low_rank(block, rows, k, lora, rank, low)");
  static_assert(AddsOuterProducts<G>, "a back end needs outer(a, a_stride, rows, b, k, c)");
  static_assert(Transposes<G>,
                "a back end needs transpose and transpose_padded(from, stride, rows, columns, to, stride)");
  return BackEnd<G, S>;
}

}  // namespace jitmoe
