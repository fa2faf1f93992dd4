// Forward: gather and low-rank products, gate and up with the activation, down with the token sums.
#pragma once
#include "activation.hpp"
#include "gemm/pack.hpp"
#include "lora.hpp"
#include "parallel.hpp"
#include "watch/traced.hpp"

namespace jitmoe {

enum class ForwardStep { load, gate_up, down_low, down };  // FORWARD_STEPS in memory.py

// Row blocks of a group's panels.
struct BlockRange {
  int64_t first;
  int64_t count;
};

// One thread's view of one pass over one group. Every function is one item of work.
template <Shape S, class Gemm>
struct ForwardSteps {
  using Operand = typename Gemm::Operand;
  using Lora = LoraMatrix<S>;
  static constexpr bool kTraced = S.watch == Watch::values;
  const Call& call;
  const Group& group;
  const ThreadScratch& scratch;

  static Operand* panel(void* base, int64_t block, int64_t k) {
    return static_cast<Operand*>(base) + block * Gemm::block_elements(k);
  }
  float* low(float* base, int64_t block) const { return base + block * call.rank * S.m_step; }
  float* low_rows(float* base, int64_t row) const { return base + (row - group.first_row) * call.rank; }
  float* saved_rows(float* saved, int64_t row) const { return saved ? saved + row * call.rank : nullptr; }
  float scale() const { return static_cast<float>(call.scale); }

  static BlockRange blocks_of(const Block& block) { return {block.index, 1}; }
  static BlockRange blocks_of(const Segment& segment) {
    return {segment.block, RowBlocks(segment.rows, S.m_step).count};
  }
  // What an item reads and writes, see checked.hpp. Blocks are taken whole: rows that a block lacks are never
  // written.
  template <class Item>
  void announce_panel(Access access, void* Call::* buffer, const Item& item, int64_t k) const {
    const BlockRange blocks = blocks_of(item);
    announce<S>(call, access, buffer, panel(call.*buffer, blocks.first, k),
                blocks.count * Gemm::block_elements(k) * sizeof(Operand));
  }
  template <class Item>
  void announce_low(Access access, float* Call::* buffer, const Item& item) const {
    const BlockRange blocks = blocks_of(item);
    announce<S>(call, access, buffer, low(call.*buffer, blocks.first),
                blocks.count * call.rank * S.m_step * sizeof(float));
  }
  template <class Item>
  void announce_low_rows(Access access, float* Call::* buffer, const Item& item) const {
    announce<S>(call, access, buffer, low_rows(call.*buffer, item.row),
                item.rows * call.rank * sizeof(float));
  }
  // The first `strips` strips of this thread, its weights and its LoRA strip: what a product writes.
  void announce_product(const Segment& segment, int64_t strips) const {
    announce<S>(call, Access::write, &Call::thread_strips, scratch.strips,
                strips * segment.rows * kStrip * sizeof(float));
    announce<S>(call, Access::write, &Call::thread_weights, scratch.weights, call.weights_stride);
    announce<S>(call, Access::write, &Call::thread_lora, scratch.lora, call.lora_stride);
  }

  const bf16* gate_strip(int64_t expert, int64_t strip) const {
    return call.gate_weights + strip_offset(expert, S.intermediate, S.hidden, strip);
  }
  const bf16* up_strip(int64_t expert, int64_t strip) const {
    return call.up_weights + strip_offset(expert, S.intermediate, S.hidden, strip);
  }
  const bf16* down_strip(int64_t expert, int64_t strip) const {
    return call.down_weights + strip_offset(expert, S.hidden, S.intermediate, strip);
  }
  static int64_t strip_offset(int64_t expert, int64_t out, int64_t in, int64_t strip) {
    return expert * packed_elements(out, in) + strip * packed_elements(kStrip, in);
  }
  Lora gate_a(int64_t expert) const { return {call.gate_lora_a, expert, call.rank, S.hidden}; }
  Lora gate_b(int64_t expert) const { return {call.gate_lora_b, expert, S.intermediate, call.rank}; }
  Lora up_a(int64_t expert) const { return {call.up_lora_a, expert, call.rank, S.hidden}; }
  Lora up_b(int64_t expert) const { return {call.up_lora_b, expert, S.intermediate, call.rank}; }
  Lora down_a(int64_t expert) const { return {call.down_lora_a, expert, call.rank, S.intermediate}; }
  Lora down_b(int64_t expert) const { return {call.down_lora_b, expert, S.hidden, call.rank}; }

  void gather_block(const bf16* tokens, const Block& block, Operand* target) const {
    constexpr int64_t stride = round_up(S.hidden, kKStep);
    announce<S>(call, Access::write, &Call::thread_rows, scratch.rows, block.rows * stride * sizeof(bf16));
    {
      const Lap<S> lap(scratch, Step::gather);
      call.gather_rows(tokens, S.hidden, call.row_token + block.row, block.rows, 0, S.hidden, scratch.rows,
                       stride);
      for (int64_t row = 0; row < block.rows; ++row)
        for (int64_t c = S.hidden; c < stride; ++c) scratch.rows[row * stride + c] = 0;
    }
    const Lap<S> lap(scratch, Step::pack);
    Gemm::pack_rows(scratch.rows, stride, block.rows, S.hidden, target);
  }

  void load(const Block& block) const {
    announce_panel(Access::write, &Call::x_panel, block, S.hidden);
    load_x(block, saved_rows(call.saved_gate_u, block.row), saved_rows(call.saved_up_u, block.row));
  }

  // x rows -> panel, and s x A^T of gate and up.
  void load_x(const Block& block, float* gate_rows, float* up_rows) const {
    Operand* target = panel(call.x_panel, block.index, S.hidden);
    gather_block(call.x, block, target);
    if constexpr (kTraced)
      observe_rows<S>(call, Observed::x, block, scratch.rows, round_up(S.hidden, kKStep));
    if (!call.rank) return;
    announce_low(Access::write, &Call::gate_low, block);
    announce_low(Access::write, &Call::up_low, block);
    const Lap<S> lap(scratch, Step::low_rank);
    const int64_t expert = block.segment->expert;
    low_rank_block<S, Gemm>(target, block.rows, S.hidden, gate_a(expert).along_columns(), call.rank, scale(),
                            low(call.gate_low, block.index), gate_rows, nullptr);
    low_rank_block<S, Gemm>(target, block.rows, S.hidden, up_a(expert).along_columns(), call.rank, scale(),
                            low(call.up_low, block.index), up_rows, nullptr);
    if constexpr (kTraced) {
      observe_low<S>(call, Observed::gate_u, block, low(call.gate_low, block.index));
      observe_low<S>(call, Observed::up_u, block, low(call.up_low, block.index));
    }
  }

  // result = [x | u] . [W | B]^T for 32 columns of `out`.
  void project(const Segment& segment, void* x_panel, int64_t in, const Weights& weights, float* low_panel,
               Lora b, int64_t column, int64_t out, Step step, float* result) const {
    const SumStart start = start_of(segment, low_panel, [&](float* strip) {
      load_rows<S, Gemm>(b, call.rank, column, smaller(kStrip, out - column), strip);
    });
    const Lap<S> lap(scratch, step);
    Gemm::forward(panel(x_panel, segment.block, in), segment.rows, in, weights, start, result,
                  scratch.weights);
  }

  // The LoRA K-step of 32 columns of a product: low-rank rows times what `load` puts into a strip.
  template <class Load>
  SumStart start_of(const Segment& segment, float* low_panel, Load&& load) const {
    const Lap<S> lap(scratch, Step::low_rank);
    load(scratch.lora);
    return SumStart::zeros().with_lora(low(low_panel, segment.block), scratch.lora, call.rank);
  }

  // Gate and up of 32 columns; their activation goes into act_panel, their values where `gate` and `up`
  // point, each only where wanted.
  void gate_up(const Segment& segment, int64_t strip, bf16* gate, bf16* up, void* act_panel) const {
    announce_panel(Access::read, &Call::x_panel, segment, S.hidden);
    announce_low(Access::read, &Call::gate_low, segment);
    announce_low(Access::read, &Call::up_low, segment);
    announce_product(segment, 2);
    if (act_panel) {
      announce_panel(Access::write, &Call::act_panel, segment, S.intermediate);
    }
    const int64_t expert = segment.expert;
    const Weights gate_weights{gate_strip(expert, strip), up_strip(expert, strip), kBlockElements};
    const Weights up_weights{up_strip(expert, strip), gate_strip(expert, strip + 1), kBlockElements};
    float* gates = scratch.strip(0, segment.rows);
    float* ups = scratch.strip(1, segment.rows);
    project(segment, call.x_panel, S.hidden, gate_weights, call.gate_low, gate_b(expert), strip * kStrip,
            S.intermediate, Step::gate_up, gates);
    project(segment, call.x_panel, S.hidden, up_weights, call.up_low, up_b(expert), strip * kStrip,
            S.intermediate, Step::gate_up, ups);
    if constexpr (kTraced) {
      observe_strip(call, Observed::gate, segment, strip, S.intermediate, gates);
      observe_strip(call, Observed::up, segment, strip, S.intermediate, ups);
    }
    const Lap<S> lap(scratch, Step::activation);
    const int64_t column = strip * kStrip;
    const int64_t columns = smaller(kStrip, S.intermediate - column);
    if (gate) {
      store_bf16(gates, segment.rows, gate);
      store_bf16(ups, segment.rows, up);
    }
    if (!act_panel) return;
#pragma omp simd
    for (int64_t i = 0; i < segment.rows * kStrip; ++i)
      gates[i] = round_to_bf16(ActivationOf<S.activation>::value(gates[i], ups[i]));
    if constexpr (kTraced) observe_strip(call, Observed::act, segment, strip, S.intermediate, gates);
    store_panel(gates, segment, column, columns, act_panel);
  }

  // Where the 32 columns of some rows lie in a saved matrix [strips, all_rows, 32]: strip by strip, because
  // pieces of 64 bytes a row would each touch another page.
  static bf16* saved_strip(bf16* saved, int64_t strip, int64_t all_rows, int64_t row) {
    return saved ? saved + (strip * all_rows + row) * kStrip : nullptr;
  }

  static void store_bf16(const float* strip, int64_t rows, bf16* target) {
    for (int64_t i = 0; i < rows * kStrip; ++i) target[i] = to_bf16(strip[i]);
  }

  void store_panel(const float* strip, const Segment& segment, int64_t column, int64_t columns,
                   void* target) const {
    const RowBlocks blocks(segment.rows, S.m_step);
    for (int64_t b = 0; b < blocks.count; ++b)
      Gemm::pack_strip(strip + blocks.begin(b) * kStrip, blocks.size(b), column, columns, S.intermediate,
                       panel(target, segment.block + b, S.intermediate));
  }

  void down_low(const Block& block) const {
    announce_panel(Access::read, &Call::act_panel, block, S.intermediate);
    announce_low(Access::write, &Call::down_low, block);
    const Lap<S> lap(scratch, Step::low_rank);
    low_rank_block<S, Gemm>(panel(call.act_panel, block.index, S.intermediate), block.rows, S.intermediate,
                            down_a(block.segment->expert).along_columns(), call.rank, scale(),
                            low(call.down_low, block.index), saved_rows(call.saved_down_u, block.row),
                            nullptr);
    if constexpr (kTraced) observe_low<S>(call, Observed::down_u, block, low(call.down_low, block.index));
  }

  // 32 columns of down, added to the sums of the tokens with the routing weights.
  void down(const Segment& segment, const Next& next, int64_t strip) const {
    announce_panel(Access::read, &Call::act_panel, segment, S.intermediate);
    announce_low(Access::read, &Call::down_low, segment);
    announce_product(segment, 1);
    const Weights weights{down_strip(segment.expert, strip), down_strip(next.expert, next.strip),
                          kBlockElements};
    float* result = scratch.strip(0, segment.rows);
    project(segment, call.act_panel, S.intermediate, weights, call.down_low, down_b(segment.expert),
            strip * kStrip, S.hidden, Step::down, result);
    if constexpr (kTraced) observe_strip(call, Observed::down, segment, strip, S.hidden, result);
    add_to_tokens(segment, strip, result, 1);
  }

  void add_to_tokens(const Segment& segment, int64_t strip, const float* values, int64_t weighted) const {
    announce_sums<S>(call, Access::read, strip);
    const Lap<S> lap(scratch, Step::combine);
    call.sum_rows(values, kStrip, call.row_token + segment.row, call.row_weight + segment.row, weighted,
                  segment.rows, 0, smaller(kStrip, S.hidden - strip * kStrip), sums_of(call, strip), kStrip);
  }
};

template <Shape S, class Gemm>
void forward_group(const Call& call, const Group& group, const ThreadScratch& scratch) {
  const ForwardSteps<S, Gemm> steps{call, group, scratch};
  enter_step<S>(call, ForwardStep::load);
  for_each_block<S>(group, [&](const Block& block) { steps.load(block); });
  enter_step<S>(call, ForwardStep::gate_up);
  for_each_segment_strip(group, S.intermediate, [&](const Segment& segment, int64_t strip) {
    steps.gate_up(segment, strip, steps.saved_strip(call.saved_gate, strip, call.rows, segment.row),
                  steps.saved_strip(call.saved_up, strip, call.rows, segment.row), call.act_panel);
  });
  enter_step<S>(call, ForwardStep::down_low);
  if (call.rank) for_each_block<S>(group, [&](const Block& block) { steps.down_low(block); });
  enter_step<S>(call, ForwardStep::down);
  for_each_strip(group, S.hidden, [&](const Segment& segment, const Next& next, int64_t strip) {
    steps.down(segment, next, strip);
  });
}

}  // namespace jitmoe
