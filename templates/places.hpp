// Where things lie that a thread reads and writes: parts of the buffers of a call, which a checked instance is told of.
#pragma once
#include "lora.hpp"
#include "parallel.hpp"

namespace jitmoe {

template <Shape S, class Gemm>
struct Places {
  using Operand = typename Gemm::Operand;
  using Form = typename LoraFormOf<S, Gemm>::type;

  const Call& call;
  const Group& group;
  const Thread& thread;

  // Blocks are taken whole: rows that a block lacks are never written.

  struct BlockRange {
    int64_t first;
    int64_t count;
  };
  static BlockRange blocks_of(const Block& block) { return {block.index, 1}; }
  static BlockRange blocks_of(const Segment& segment) {
    return {segment.block, RowBlocks(segment.rows, S.m_step).count};
  }
  template <class Item>
  Operand* panel(Access access, void* const& buffer, const Item& item, int64_t k) const {
    const BlockRange blocks = blocks_of(item);
    Operand* at = static_cast<Operand*>(buffer) + blocks.first * Gemm::block_elements(k);
    return touch<S>(call, access, buffer, at, blocks.count * Gemm::block_elements(k) * sizeof(Operand));
  }
  template <class Item>
  float* low(Access access, const Projection& of, const Item& item) const {
    const BlockRange blocks = blocks_of(item);
    const int64_t elements = Form::low_floats(call.rank);
    return touch<S>(call, access, of.low, of.low + blocks.first * elements,
                    blocks.count * elements * sizeof(float));
  }
  // Rows of a buffer [rows of the group, columns].
  template <class Item>
  float* rows(Access access, float* const& buffer, const Item& item, int64_t columns) const {
    return touch<S>(call, access, buffer, buffer + (item.row - group.first_row) * columns,
                    item.rows * columns * sizeof(float));
  }
  // The left operand of gradients for the rows of an item, u or du.
  template <class Item>
  float* left(Access access, float* const& buffer, const Item& item) const {
    const BlockRange blocks = blocks_of(item);
    return touch<S>(call, access, buffer,
                    buffer + Form::left_floats(item.row - group.first_row, blocks.first, call.rank),
                    Form::left_floats(item.rows, blocks.count, call.rank) * sizeof(float));
  }
  // What forward saved of u for the rows of an item; null where it saves nothing.
  template <class Item>
  float* saved_u(const Projection& of, const Item& item) const {
    return of.saved_u ? of.saved_u + item.row * call.rank : nullptr;
  }
  // The 32 columns of a segment in a matrix that was saved, or computed again, strip by strip: pieces of 64 bytes a row
  // would each touch another page.
  bf16* saved_strip(const Projection& of, const Segment& segment, int64_t strip) const {
    return of.saved ? of.saved + (strip * call.rows + segment.row) * kStrip : nullptr;
  }
  bf16* again_strip(Access access, const Projection& of, const Segment& segment, int64_t strip) const {
    bf16* at = of.again + (strip * group.rows + segment.row - group.first_row) * kStrip;
    return touch<S>(call, access, of.again, at, segment.rows * kStrip * sizeof(bf16));
  }
  // A strip [rows, 32] of this thread, to be written. On tiles it may hold whole blocks of pairs.
  float* strip(int64_t index, const Segment& segment) const {
    const int64_t count = (Form::kPairs ? round_up(segment.rows, kTile) : segment.rows) * kStrip;
    return touch<S>(call, Access::write, call.thread_strips.data, thread.strips + index * count,
                    count * sizeof(float));
  }
  bf16* gathered(int64_t count) const {
    return touch<S>(call, Access::write, call.thread_rows.data, thread.rows, count * sizeof(bf16));
  }
  float* lora_strip() const {
    return touch<S>(call, Access::write, call.thread_lora.data, thread.lora, call.thread_lora.stride);
  }
  float* expanded() const {
    return touch<S>(call, Access::write, call.thread_weights.data, thread.weights,
                    call.thread_weights.stride);
  }
};

}  // namespace jitmoe
