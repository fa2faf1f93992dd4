// The interface of the matrix back ends, and the one packed layout of the weights that all of them read: that of bfloat16,
// of which other formats are codes (weights/layout.hpp).
//
// W[out, in] of one expert is cut into strips of 32 outputs. A strip is contiguous, so forward streams it from memory
// once, front to back:
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
// Sizes that are no multiple of 32 are padded with zeros. The padding changes no result, whatever it holds:
// contractions end before it, and nobody reads columns of results beyond the matrix. Backward contracts over `out` and
// reads the same tiles; there is no second copy.
//
// A segment, rows of one expert, is cut into row blocks of at most m_step rows, sized evenly. A panel is the left
// operand of a product: row block after row block, each in the order that its back end reads. A strip of results is
// row-major float32 [rows, 32].
//
// A back end is a class template over the shape. `BackEnd` below is its contract, one concept for each function.
#pragma once
#include <concepts>
#include <type_traits>

#include "weights/decode.hpp"

namespace jitmoe {

// Even cut of the rows of a segment into row blocks of at most m_step: 15 rows at m_step 14 are 8 + 7, because a block
// of one row waits for the latency of its additions. Where m_step is whole tiles of 16 rows, each block but the last is
// too, so that at most one tile is not full.
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

alignas(64) inline constexpr float kZeros[kStrip] = {};

// What the sums of a product begin with. Those of row r begin with from[r * stride + column]; then comes the LoRA
// K-step, `low` [blocks, rank, m_step] (u or du of the rows) times `lora` [rank, 32]; or as the back end has them.
//
//                 from             stride
//     zeros       32 zeros            0       the same for every row
//     bias        32 of the bias      0
//     strip       a strip            32       may be the strip that the product writes
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

// Ask for one line, and for some lines of packed weights. GCC 12 takes a function that only calls the prefetch builtin
// for one without effect, and drops the call.
inline void prefetch_to_l1(const bf16* line) { asm volatile("prefetcht0 %0" : : "m"(*line)); }
template <class Item>
void prefetch_to_l2(const Item* lines, int64_t items) {
  constexpr int64_t kLine = 64 / sizeof(Item);
  for (int64_t i = 0; i < items; i += kLine) asm volatile("prefetcht1 %0" : : "m"(lines[i]));
}

// Brings the next chunk of weights into the L2 cache while the row blocks sweep over the current one. For each block
// that a sweep reads, it fetches the block at the same place of the next chunk: all of it where there is one sweep,
// else a part in each of the first two or four sweeps.
template <Shape S>
class NextChunk {
 public:
  NextChunk(const Weights<S>& weights, int64_t first_block, int64_t chunk_blocks, int64_t all_blocks,
            int64_t sweeps)
      : chunk_(first_block + chunk_blocks < all_blocks ? weights.block(first_block + chunk_blocks)
                                                       : weights.next),
        stride_(weights.stride),
        parts_(sweeps >= 4 ? 4 : smaller(sweeps, 2)) {}

  void fetch(int64_t sweep, int64_t block) const {
    if (!chunk_ || sweep >= parts_) return;
    const int64_t items = Layout<S>::kBlockItems / parts_;
    prefetch_to_l2(chunk_ + block * stride_ + sweep * items, items);
  }

 private:
  const typename Layout<S>::Item* chunk_;
  int64_t stride_;
  int64_t parts_;
};

// Where nothing is fetched.
struct NoChunk {
  void fetch(int64_t, int64_t) const {}
};

// One product of backward where two are added: dv . W with its LoRA K-step. The sums begin as those of the first one.
template <Shape S, class Gemm>
struct Contraction {
  const typename Gemm::Operand* panel;
  Weights<S> weights;
  SumStart start;
};

// What a back end sets up on each thread for the time of a parallel region; most set up nothing.
template <class Gemm>
struct ThreadState {};

// A LoRA matrix read as [k, rank] with strides in elements; neither axis need be contiguous.
template <bool Bf16>
struct LoraView {
  using Element = std::conditional_t<Bf16, bf16, float>;
  const Element* data;
  int64_t k_stride;
  int64_t rank_stride;
  float at(int64_t k, int64_t r) const { return load_lora(data + k * k_stride + r * rank_stride); }
};

// The back end of a shape's instruction set. The header of each back end specialises this.
struct NoBackEnd {};
template <Shape S>
struct BackEndOf {
  using type = NoBackEnd;
};

// The form of LoRA on a back end: float32 vectors (lora.hpp), unless it specialises this.
template <Shape S, class Gemm>
struct LoraVectors;
template <Shape S, class Gemm>
struct LoraFormOf {
  using type = LoraVectors<S, Gemm>;
};

// The contract: `BackEnd` is all of these

template <class G>
concept HasOperand = requires { typename G::Operand; };

// Number of Operands in one row block of k columns.
template <class G>
concept SizesRowBlocks = requires(int64_t k) {
  { G::block_elements(k) } -> std::same_as<int64_t>;
};

// `count` rows of bfloat16, `stride` elements apart, with zeros up to a multiple of 32 columns -> one row block.
template <class G>
concept PacksRows =
    HasOperand<G> && requires(const bf16* rows, int64_t stride, int64_t count, int64_t k,
                              typename G::Operand* block) { G::pack_rows(rows, stride, count, k, block); };

// The first `columns` columns of a strip -> columns `column`... of a row block.
template <class G>
concept PacksStrips = HasOperand<G> && requires(const float* strip, int64_t count, int64_t column, int64_t k,
                                                typename G::Operand* block) {
  G::pack_strip(strip, count, column, count, k, block);
};

// strip = start + panel [rows, k] . W[32 outputs, k]^T. `scratch` has room for expanded or paired weights.
template <class G, Shape S>
concept MultipliesForward =
    HasOperand<G> && requires(const typename G::Operand* panel, int64_t rows, int64_t k,
                              const Weights<S>& weights, const SumStart& start, float* strip,
                              float* scratch) { G::forward(panel, rows, k, weights, start, strip, scratch); };

// strip = start + panel [rows, n] . W[n, 32 inputs]. Columns of `strip` and `start` are in the order of the lanes.
template <class G, Shape S>
concept MultipliesBackward = HasOperand<G> && requires(const typename G::Operand* panel, int64_t rows,
                                                       int64_t n, const Weights<S>& weights,
                                                       const SumStart& start, float* strip, float* scratch) {
  G::backward(panel, rows, n, weights, start, strip, scratch);
};

// Column that backward keeps in a lane of its strip, until the strip is put into natural order.
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

// to [columns, rows] = from [rows, columns]^T of float32; `transpose_padded` writes zeros for rows up to 32.
template <class G>
concept Transposes = requires(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  G::transpose(from, stride, rows, columns, to, stride);
  G::transpose_padded(from, stride, rows, columns, to, stride);
};

// Has LoRA in a form of its own, and needs neither of the two above.
template <class G, Shape S>
concept BringsLora = !std::is_same_v<typename LoraFormOf<S, G>::type, LoraVectors<S, G>>;

// strip = both products of backward in one contraction; not a must.
template <class G, Shape S>
concept AddsContractions =
    HasOperand<G> && requires(const Contraction<S, G> (&both)[2], int64_t rows, int64_t n, float* strip,
                              float* scratch) { G::backward(both, rows, n, strip, scratch); };

template <class G, Shape S>
concept BackEnd = SizesRowBlocks<G> && PacksRows<G> && PacksStrips<G> && MultipliesForward<G, S> &&
                  MultipliesBackward<G, S> && OrdersColumns<G> &&
                  (BringsLora<G, S> || (MultipliesLowRank<G, S> && AddsOuterProducts<G>)) && Transposes<G>;

// Whether a class is a back end; if not, an error says in a sentence what is missing.
template <class G, Shape S>
constexpr bool check_back_end() {
  static_assert(HasOperand<G>, "a back end needs a type Operand, the elements of its row blocks");
  static_assert(SizesRowBlocks<G>, "a back end needs int64_t block_elements(k)");
  static_assert(PacksRows<G>, "a back end needs pack_rows(rows, stride, count, k, block)");
  static_assert(PacksStrips<G>, "a back end needs pack_strip(strip, count, column, columns, k, block)");
  static_assert(MultipliesForward<G, S>,
                "a back end needs forward(panel, rows, k, weights, start, strip, scratch)");
  static_assert(MultipliesBackward<G, S>,
                "a back end needs backward(panel, rows, n, weights, start, strip, scratch)");
  static_assert(OrdersColumns<G>,
                "a back end needs int64_t column_at(lane) and to_natural_order(strip, rows)");
  static_assert(BringsLora<G, S> || MultipliesLowRank<G, S>,
                "a back end needs low_rank(block, rows, k, lora, rank, low)");
  static_assert(BringsLora<G, S> || AddsOuterProducts<G>,
                "a back end needs outer(a, a_stride, rows, b, k, c)");
  static_assert(Transposes<G>,
                "a back end needs transpose and transpose_padded(from, stride, rows, columns, to, stride)");
  return BackEnd<G, S>;
}

}  // namespace jitmoe
