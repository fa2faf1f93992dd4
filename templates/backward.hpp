// Backward with a frozen base: gradients of x, of the routing weights and of the six LoRA parameters.
//
//   load        out_grad rows, x rows        -> v_down = s dout B, u = s x A^T
//   act_grad    32 columns of I              -> da, dgate, dup, and the gradients of down A, gate B, up B
//   low_grads   row blocks                   -> v_gate, v_up = s d B, u_down = s a A^T, dweights
//   x_grad      32 columns of H              -> dx, and the gradients of gate A, up A, down B
//
// LoRA gradients are taken where their strip of 32 columns is at hand: each column belongs to one item,
// and the rows of an expert are added in order, group after group.
#pragma once
#include "forward.hpp"

namespace jitmoe {

template <Shape S, class Gemm>
struct BackwardSteps : ForwardSteps<S, Gemm> {
  using Base = ForwardSteps<S, Gemm>;
  using Base::call, Base::group, Base::scratch;

  bool recomputes() const { return !call.saved_gate; }
  bool wants_lora() const { return call.rank && call.gate_lora_a_grad; }

  bf16* gate_of(const Segment& segment, int64_t strip) const {
    return recomputes() ? group_strip(call.group_gate, segment, strip)
                        : this->saved_strip(call.saved_gate, strip, call.rows, segment.row);
  }
  bf16* up_of(const Segment& segment, int64_t strip) const {
    return recomputes() ? group_strip(call.group_up, segment, strip)
                        : this->saved_strip(call.saved_up, strip, call.rows, segment.row);
  }
  bf16* group_strip(bf16* saved, const Segment& segment, int64_t strip) const {
    return this->saved_strip(saved, strip, group.rows, segment.row - group.first_row);
  }

  void load(const Block& block) const {
    auto* out_block = this->panel(call.out_panel, block.index, S.hidden);
    this->gather_block(call.out_grad, block, out_block);
    if (call.rank) {
      const Lap<S> lap(scratch, Step::low_rank);
      low_rank_block<S, Gemm>(out_block, block.rows, S.hidden,
                              this->down_b(block.segment->expert).along_rows(), call.rank, this->scale(),
                              this->low(call.down_low, block.index),
                              this->low_rows(call.down_low_rows, block.row), call.row_weight + block.row);
    }
    if (recomputes() || wants_lora()) {
      auto* x_block = recomputes() ? this->panel(call.x_panel, block.index, S.hidden)
                                   : static_cast<typename Base::Operand*>(scratch.block);
      this->load_x(block, x_block, this->low_rows(call.gate_in_rows, block.row),
                   this->low_rows(call.up_in_rows, block.row));
    }
  }

  void act_grad(const Segment& segment, int64_t strip) const {
    const int64_t column = strip * kStrip;
    const int64_t columns = smaller(kStrip, S.intermediate - column);
    float* out = scratch.strip(0, segment.rows);
    down_product(segment, strip, out);
    if (call.rank) {
      const Lap<S> lap(scratch, Step::low_rank);
      add_low_rank<S, Gemm>(this->low(call.down_low, segment.block), RowBlocks(segment.rows, S.m_step),
                            call.rank, this->down_a(segment.expert).along_columns(), column, columns, out,
                            scratch.weights);
    }
    through_activation(segment, strip, column, columns, out);
    if (wants_lora()) add_intermediate_grads(segment, column, columns);
  }

  // out = out_grad . W_down for 32 columns of I.
  void down_product(const Segment& segment, int64_t strip, float* out) const {
    const Lap<S> lap(scratch, Step::act_grad);
    const bf16* blocks = this->down_strip(segment.expert, 0) + strip * kBlockElements;
    const Weights weights{blocks, blocks + kBlockElements, packed_elements(kStrip, S.intermediate)};
    clear(out, segment.rows);
    Gemm::backward(this->panel(call.out_panel, segment.block, S.hidden), segment.rows, S.hidden, weights, out,
                   scratch.weights);
    Gemm::settle(out, segment.rows);
  }

  // Strips 1, 2, 3 become a, dgate and dup, which also go into their panels.
  void through_activation(const Segment& segment, int64_t strip, int64_t column, int64_t columns,
                          float* out) const {
    const Lap<S> lap(scratch, Step::activation);
    float* acts = scratch.strip(1, segment.rows);
    float* gates = scratch.strip(2, segment.rows);
    float* ups = scratch.strip(3, segment.rows);
    load_bf16(gate_of(segment, strip), segment.rows, columns, gates);
    load_bf16(up_of(segment, strip), segment.rows, columns, ups);
    clear_padding(out, segment.rows, columns);
    const int64_t strips = ceil_div(S.intermediate, kStrip);
    for (int64_t row = 0; row < segment.rows; ++row) {
      const int64_t at = row * kStrip;
      activation_grad(call.row_weight[segment.row + row], out + at, acts + at, gates + at, ups + at);
      call.dot_parts[(segment.row + row - group.first_row) * strips + strip] = tree_sum<kStrip>(out + at);
    }
    this->store_panel(gates, segment, column, columns, call.gate_panel);
    this->store_panel(ups, segment, column, columns, call.up_panel);
    if (wants_lora()) this->store_panel(acts, segment, column, columns, call.act_panel);
  }

  // Gradients of the three parameters that have I as an axis.
  void add_intermediate_grads(const Segment& segment, int64_t column, int64_t columns) const {
    const Lap<S> lap(scratch, Step::lora_grads);
    const int64_t rows = segment.rows;
    const int64_t at = segment.expert * call.rank * S.intermediate;
    add_a_grad<Gemm>(this->low_rows(call.down_low_rows, segment.row), rows, call.rank, scratch.strip(1, rows),
                     column, columns, S.intermediate, call.down_lora_a_grad + at, scratch.weights);
    add_b_grad<Gemm>(this->low_rows(call.gate_in_rows, segment.row), rows, call.rank, scratch.strip(2, rows),
                     column, columns, call.gate_lora_b_grad + at, scratch.weights);
    add_b_grad<Gemm>(this->low_rows(call.up_in_rows, segment.row), rows, call.rank, scratch.strip(3, rows),
                     column, columns, call.up_lora_b_grad + at, scratch.weights);
  }

  // The reverse of store_bf16, with zeros beyond the edge of the matrix.
  static void load_bf16(const bf16* saved, int64_t rows, int64_t columns, float* strip) {
    for (int64_t i = 0; i < rows * kStrip; ++i) strip[i] = to_float(saved[i]);
    clear_padding(strip, rows, columns);
  }

  static void clear_padding(float* strip, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = columns; c < kStrip; ++c) strip[row * kStrip + c] = 0.0f;
  }

  // One row of 32 columns, in place: da, gate and up become da * a, dgate and dup; a is written beside them.
  static void activation_grad(float weight, float* out, float* acts, float* gates, float* ups) {
#pragma omp simd
    for (int64_t c = 0; c < kStrip; ++c) {
      const Activation result = activate(gates[c], ups[c]);
      const float a = round_to_bf16(result.a);
      gates[c] = weight * out[c] * result.by_gate;
      ups[c] = weight * out[c] * result.by_up;
      out[c] = out[c] * a;
      acts[c] = a;
    }
  }

  // A fixed tree: the same bits on every compiler's vector width.
  template <int64_t N>
  static float tree_sum(float* values) {
    if constexpr (N == 1) return values[0];
    for (int64_t i = 0; i < N / 2; ++i) values[i] += values[i + N / 2];
    return tree_sum<(N > 1 ? N / 2 : 1)>(values);
  }

  void low_grads(const Block& block) const {
    const Lap<S> lap(scratch, Step::low_rank);
    const int64_t expert = block.segment->expert;
    const int64_t strips = ceil_div(S.intermediate, kStrip);
    for (int64_t row = block.row; row < block.row + block.rows; ++row) {
      const float* parts = call.dot_parts + (row - group.first_row) * strips;
      float sum = 0;
      for (int64_t strip = 0; strip < strips; ++strip) sum += parts[strip];
      call.weights_grad[call.row_slot[row]] = sum;
    }
    if (!call.rank) return;
    low_rank_block<S, Gemm>(this->panel(call.gate_panel, block.index, S.intermediate), block.rows,
                            S.intermediate, this->gate_b(expert).along_rows(), call.rank, this->scale(),
                            this->low(call.gate_low, block.index),
                            this->low_rows(call.gate_low_rows, block.row), nullptr);
    low_rank_block<S, Gemm>(this->panel(call.up_panel, block.index, S.intermediate), block.rows,
                            S.intermediate, this->up_b(expert).along_rows(), call.rank, this->scale(),
                            this->low(call.up_low, block.index), this->low_rows(call.up_low_rows, block.row),
                            nullptr);
    if (wants_lora())
      low_rank_block<S, Gemm>(this->panel(call.act_panel, block.index, S.intermediate), block.rows,
                              S.intermediate, this->down_a(expert).along_columns(), call.rank, this->scale(),
                              this->low(call.down_low, block.index),
                              this->low_rows(call.down_in_rows, block.row), call.row_weight + block.row);
  }

  void x_grad(const Segment& segment, const Next& next, int64_t strip) const {
    const int64_t column = strip * kStrip;
    const int64_t columns = smaller(kStrip, S.hidden - column);
    if (call.sums) {
      float* sum = scratch.strip(0, segment.rows);
      gate_up_product(segment, next, strip, sum);
      if (call.rank) add_x_low_rank(segment, column, columns, sum);
      this->add_to_tokens(segment, strip, sum, 0);
    }
    if (wants_lora()) add_hidden_grads(segment, column, columns);
  }

  // sum = dgate . W_gate + dup . W_up for 32 columns of H.
  void gate_up_product(const Segment& segment, const Next& next, int64_t strip, float* sum) const {
    const Lap<S> lap(scratch, Step::x_grad);
    const bf16* gate = this->gate_strip(segment.expert, 0) + strip * kBlockElements;
    const bf16* up = this->up_strip(segment.expert, 0) + strip * kBlockElements;
    clear(sum, segment.rows);
    add_base(segment, call.gate_panel, gate, up, sum);
    add_base(segment, call.up_panel, up, this->gate_strip(next.expert, 0) + next.strip * kBlockElements, sum);
    Gemm::settle(sum, segment.rows);
  }

  void add_x_low_rank(const Segment& segment, int64_t column, int64_t columns, float* sum) const {
    const Lap<S> lap(scratch, Step::low_rank);
    const RowBlocks blocks(segment.rows, S.m_step);
    add_low_rank<S, Gemm>(this->low(call.gate_low, segment.block), blocks, call.rank,
                          this->gate_a(segment.expert).along_columns(), column, columns, sum,
                          scratch.weights);
    add_low_rank<S, Gemm>(this->low(call.up_low, segment.block), blocks, call.rank,
                          this->up_a(segment.expert).along_columns(), column, columns, sum, scratch.weights);
  }

  void add_base(const Segment& segment, void* panel, const bf16* blocks, const bf16* next, float* sum) const {
    const Weights weights{blocks, next, packed_elements(kStrip, S.hidden)};
    Gemm::backward(this->panel(panel, segment.block, S.intermediate), segment.rows, S.intermediate, weights,
                   sum, scratch.weights);
  }

  // Gradients of the three parameters that have H as an axis.
  void add_hidden_grads(const Segment& segment, int64_t column, int64_t columns) const {
    const Lap<S> lap(scratch, Step::lora_grads);
    float* values = scratch.strip(1, segment.rows);
    const int64_t at = segment.expert * call.rank * S.hidden;
    gather_strip(call.x, segment, column, columns, values);
    add_a_grad<Gemm>(this->low_rows(call.gate_low_rows, segment.row), segment.rows, call.rank, values, column,
                     columns, S.hidden, call.gate_lora_a_grad + at, scratch.weights);
    add_a_grad<Gemm>(this->low_rows(call.up_low_rows, segment.row), segment.rows, call.rank, values, column,
                     columns, S.hidden, call.up_lora_a_grad + at, scratch.weights);
    gather_strip(call.out_grad, segment, column, columns, values);
    add_b_grad<Gemm>(this->low_rows(call.down_in_rows, segment.row), segment.rows, call.rank, values, column,
                     columns, call.down_lora_b_grad + at, scratch.weights);
  }

  void gather_strip(const bf16* tokens, const Segment& segment, int64_t column, int64_t columns,
                    float* strip) const {
    call.gather_rows(tokens, S.hidden, call.row_token + segment.row, segment.rows, column, columns,
                     scratch.rows, kStrip);
    for (int64_t row = 0; row < segment.rows; ++row)
      for (int64_t c = 0; c < columns; ++c)
        strip[row * kStrip + c] = to_float(scratch.rows[row * kStrip + c]);
    clear_padding(strip, segment.rows, columns);
  }
};

template <Shape S, class Gemm>
void backward_group(const Call& call, const Group& group, const ThreadScratch& scratch) {
  const BackwardSteps<S, Gemm> steps{{call, group, scratch}};
  for_each_block<S>(group, [&](const Block& block) { steps.load(block); });
  if (steps.recomputes())
    for_each_segment_strip(group, S.intermediate, [&](const Segment& segment, int64_t strip) {
      steps.gate_up(segment, strip, steps.gate_of(segment, strip), steps.up_of(segment, strip), nullptr);
    });
  for_each_segment_strip(group, S.intermediate,
                         [&](const Segment& segment, int64_t strip) { steps.act_grad(segment, strip); });
  for_each_block<S>(group, [&](const Block& block) { steps.low_grads(block); });
  for_each_strip(group, S.hidden, [&](const Segment& segment, const Next& next, int64_t strip) {
    steps.x_grad(segment, next, strip);
  });
}

}  // namespace jitmoe
