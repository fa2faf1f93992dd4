// Backward with a frozen base: gradients of x, of the routing weights and of the six LoRA parameters.
//
//   load        out_grad rows                -> v_down = s dout B
//   act_grad    32 columns of I              -> da, dgate, dup, and the gradients of down A, gate B, up B
//   low_grads   row blocks                   -> v_gate, v_up = s d B, dweights
//   x_grad      32 columns of H              -> dx, and the gradients of gate A, up A, down B
//
// With recomputation, load, gate_up and low_grads also compute again what forward would have saved.
//
// LoRA gradients are taken where their strip of 32 columns is at hand: each column belongs to one item,
// and the rows of an expert are added in order, group after group.
#pragma once
#include "forward.hpp"

namespace jitmoe {

enum class BackwardStep { load, gate_up, act_grad, low_grads, x_grad };  // BACKWARD_STEPS in memory.py

template <Shape S, class Gemm>
struct BackwardSteps : ForwardSteps<S, Gemm> {
  using Base = ForwardSteps<S, Gemm>;
  using Base::call, Base::group, Base::scratch, Base::kTraced;

  bool recomputes() const { return !call.saved_gate; }
  bool wants_lora() const { return call.rank && call.gate_lora_a_grad; }
  bool needs_acts() const {
    return recomputes() && wants_lora();
  }  // once more as forward had them, for s a A^T

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
  void announce_group_strip(Access access, bf16* Call::* buffer, const Segment& segment,
                            int64_t strip) const {
    announce<S>(call, access, buffer, group_strip(call.*buffer, segment, strip),
                segment.rows * kStrip * sizeof(bf16));
  }
  // s v A^T of some rows: what forward saved, or what this pass computed again.
  const float* in_rows(float* saved, float* again, int64_t row) const {
    return recomputes() ? this->low_rows(again, row) : this->saved_rows(saved, row);
  }
  template <class Item>
  void announce_in_rows(Access access, float* Call::* buffer, const Item& item) const {
    if (recomputes()) this->announce_low_rows(access, buffer, item);
  }

  // One row of parts for each row of the item.
  template <class Item>
  void announce_dot_parts(Access access, const Item& item) const {
    const int64_t strips = ceil_div(S.intermediate, kStrip);
    announce<S>(call, access, &Call::dot_parts, call.dot_parts + (item.row - group.first_row) * strips,
                item.rows * strips * sizeof(float));
  }

  void load(const Block& block) const {
    auto* out_block = this->panel(call.out_panel, block.index, S.hidden);
    this->announce_panel(Access::write, &Call::out_panel, block, S.hidden);
    this->gather_block(call.out_grad, block, out_block);
    if constexpr (kTraced)
      observe_rows<S>(call, Observed::dout, block, scratch.rows, round_up(S.hidden, kKStep));
    if (call.rank) {
      this->announce_low(Access::write, &Call::down_low, block);
      this->announce_low_rows(Access::write, &Call::down_low_rows, block);
      const Lap<S> lap(scratch, Step::low_rank);
      low_rank_block<S, Gemm>(out_block, block.rows, S.hidden,
                              this->down_b(block.segment->expert).along_rows(), call.rank, this->scale(),
                              this->low(call.down_low, block.index),
                              this->low_rows(call.down_low_rows, block.row), call.row_weight + block.row);
      if constexpr (kTraced)
        observe_low<S>(call, Observed::down_du, block, this->low(call.down_low, block.index));
    }
    if (recomputes()) {
      this->announce_panel(Access::write, &Call::x_panel, block, S.hidden);
      this->announce_low_rows(Access::write, &Call::gate_in_rows, block);
      this->announce_low_rows(Access::write, &Call::up_in_rows, block);
      this->load_x(block, this->low_rows(call.gate_in_rows, block.row),
                   this->low_rows(call.up_in_rows, block.row));
    } else if constexpr (kTraced) {
      if (wants_lora()) observe_saved(block);
    }
  }

  // What the gradients of LoRA read of forward without computing it again.
  void observe_saved(const Block& block) const {
    constexpr int64_t stride = round_up(S.hidden, kKStep);
    call.gather_rows(call.x, S.hidden, call.row_token + block.row, block.rows, 0, S.hidden, scratch.rows,
                     stride);
    observe_rows<S>(call, Observed::x, block, scratch.rows, stride);
    const Piece piece{block.row, block.rows, 0, call.rank, call.rank, 1};
    const int64_t expert = block.segment->expert;
    observe(call, Observed::gate_u, expert, piece, this->saved_rows(call.saved_gate_u, block.row));
    observe(call, Observed::up_u, expert, piece, this->saved_rows(call.saved_up_u, block.row));
    observe(call, Observed::down_u, expert, piece, this->saved_rows(call.saved_down_u, block.row));
  }

  void recompute(const Segment& segment, int64_t strip) const {
    announce_group_strip(Access::write, &Call::group_gate, segment, strip);
    announce_group_strip(Access::write, &Call::group_up, segment, strip);
    this->gate_up(segment, strip, gate_of(segment, strip), up_of(segment, strip),
                  needs_acts() ? call.act_panel : nullptr);
  }

  void act_grad(const Segment& segment, int64_t strip) const {
    this->announce_panel(Access::read, &Call::out_panel, segment, S.hidden);
    this->announce_low(Access::read, &Call::down_low, segment);
    this->announce_product(segment, 4);
    const int64_t column = strip * kStrip;
    const int64_t columns = smaller(kStrip, S.intermediate - column);
    float* out = scratch.strip(0, segment.rows);
    down_product(segment, strip, out);
    if constexpr (kTraced) observe_strip(call, Observed::dact, segment, strip, S.intermediate, out);
    through_activation(segment, strip, column, columns, out);
    if (wants_lora()) add_intermediate_grads(segment, column, columns);
  }

  // out = [out_grad | s out_grad B] . [W_down ; A] for 32 columns of I.
  void down_product(const Segment& segment, int64_t strip, float* out) const {
    const SumStart start =
        start_of_a(segment, call.down_low, this->down_a(segment.expert), strip, S.intermediate);
    const Lap<S> lap(scratch, Step::act_grad);
    const bf16* blocks = this->down_strip(segment.expert, 0) + strip * kBlockElements;
    const Weights weights{blocks, blocks + kBlockElements, packed_elements(kStrip, S.intermediate)};
    Gemm::backward(this->panel(call.out_panel, segment.block, S.hidden), segment.rows, S.hidden, weights,
                   start, out, scratch.weights);
    Gemm::to_natural_order(out, segment.rows);
  }

  // The LoRA K-step of 32 columns of a product with A [r, width].
  SumStart start_of_a(const Segment& segment, float* low_panel, typename Base::Lora a, int64_t strip,
                      int64_t width) const {
    return this->start_of(segment, low_panel, [&](float* lora) {
      load_columns<S, Gemm>(a, call.rank, strip * kStrip, smaller(kStrip, width - strip * kStrip), lora);
    });
  }

  // Strips 1, 2, 3 become a, dgate and dup, which also go into their panels.
  void through_activation(const Segment& segment, int64_t strip, int64_t column, int64_t columns,
                          float* out) const {
    announce_activation(segment, strip);
    const Lap<S> lap(scratch, Step::activation);
    float* acts = scratch.strip(1, segment.rows);
    float* gates = scratch.strip(2, segment.rows);
    float* ups = scratch.strip(3, segment.rows);
    load_bf16(gate_of(segment, strip), segment.rows, columns, gates);
    load_bf16(up_of(segment, strip), segment.rows, columns, ups);
    if constexpr (kTraced)
      if (!recomputes()) {
        observe_strip(call, Observed::gate, segment, strip, S.intermediate, gates);
        observe_strip(call, Observed::up, segment, strip, S.intermediate, ups);
      }
    clear_padding(out, segment.rows, columns);
    const int64_t strips = ceil_div(S.intermediate, kStrip);
    for (int64_t row = 0; row < segment.rows; ++row) {
      const int64_t at = row * kStrip;
      activation_grad(call.row_weight[segment.row + row], out + at, acts + at, gates + at, ups + at);
      call.dot_parts[(segment.row + row - group.first_row) * strips + strip] = tree_sum<kStrip>(out + at);
    }
    if constexpr (kTraced) {
      if (!needs_acts()) observe_strip(call, Observed::act, segment, strip, S.intermediate, acts);
      observe_strip(call, Observed::dgate, segment, strip, S.intermediate, gates);
      observe_strip(call, Observed::dup, segment, strip, S.intermediate, ups);
    }
    this->store_panel(gates, segment, column, columns, call.gate_panel);
    this->store_panel(ups, segment, column, columns, call.up_panel);
  }

  void announce_activation(const Segment& segment, int64_t strip) const {
    if (recomputes()) {
      announce_group_strip(Access::read, &Call::group_gate, segment, strip);
      announce_group_strip(Access::read, &Call::group_up, segment, strip);
    }
    announce_dot_parts(Access::write, segment);
    this->announce_panel(Access::write, &Call::gate_panel, segment, S.intermediate);
    this->announce_panel(Access::write, &Call::up_panel, segment, S.intermediate);
  }

  // Gradients of the three parameters that have I as an axis.
  void add_intermediate_grads(const Segment& segment, int64_t column, int64_t columns) const {
    this->announce_low_rows(Access::read, &Call::down_low_rows, segment);
    announce_in_rows(Access::read, &Call::gate_in_rows, segment);
    announce_in_rows(Access::read, &Call::up_in_rows, segment);
    const Lap<S> lap(scratch, Step::lora_grads);
    const int64_t rows = segment.rows;
    const auto place = [&](float* grad) {
      return grad_strip(grad, segment, S.intermediate, column, columns);
    };
    add_a_grad<Gemm>(this->low_rows(call.down_low_rows, segment.row), rows, call.rank, scratch.strip(1, rows),
                     place(call.down_lora_a_grad), scratch.lora);
    add_b_grad<Gemm>(in_rows(call.saved_gate_u, call.gate_in_rows, segment.row), rows, call.rank,
                     scratch.strip(2, rows), place(call.gate_lora_b_grad), scratch.lora);
    add_b_grad<Gemm>(in_rows(call.saved_up_u, call.up_in_rows, segment.row), rows, call.rank,
                     scratch.strip(3, rows), place(call.up_lora_b_grad), scratch.lora);
  }

  // 32 columns of the axis of length `width` in the gradient of one expert.
  GradStrip grad_strip(float* grad, const Segment& segment, int64_t width, int64_t column,
                       int64_t columns) const {
    const bool first = &segment == call.segments || (&segment)[-1].expert != segment.expert;
    return {grad + segment.expert * call.rank * width, column, columns, width, first};
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
      const ActivationGradient result = ActivationOf<S.activation>::gradient(gates[c], ups[c]);
      const float a = round_to_bf16(result.value);
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
    announce_dot_parts(Access::read, block);
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
    announce_low_grads(block);
    low_rank_block<S, Gemm>(this->panel(call.gate_panel, block.index, S.intermediate), block.rows,
                            S.intermediate, this->gate_b(expert).along_rows(), call.rank, this->scale(),
                            this->low(call.gate_low, block.index),
                            this->low_rows(call.gate_low_rows, block.row), nullptr);
    low_rank_block<S, Gemm>(this->panel(call.up_panel, block.index, S.intermediate), block.rows,
                            S.intermediate, this->up_b(expert).along_rows(), call.rank, this->scale(),
                            this->low(call.up_low, block.index), this->low_rows(call.up_low_rows, block.row),
                            nullptr);
    if constexpr (kTraced) {
      observe_low<S>(call, Observed::gate_du, block, this->low(call.gate_low, block.index));
      observe_low<S>(call, Observed::up_du, block, this->low(call.up_low, block.index));
    }
    if (needs_acts()) {
      low_rank_block<S, Gemm>(this->panel(call.act_panel, block.index, S.intermediate), block.rows,
                              S.intermediate, this->down_a(expert).along_columns(), call.rank, this->scale(),
                              this->low(call.down_low, block.index),
                              this->low_rows(call.down_in_rows, block.row), nullptr);
      if constexpr (kTraced)
        observe_low<S>(call, Observed::down_u, block, this->low(call.down_low, block.index));
    }
  }

  void announce_low_grads(const Block& block) const {
    this->announce_panel(Access::read, &Call::gate_panel, block, S.intermediate);
    this->announce_panel(Access::read, &Call::up_panel, block, S.intermediate);
    this->announce_low(Access::write, &Call::gate_low, block);
    this->announce_low(Access::write, &Call::up_low, block);
    this->announce_low_rows(Access::write, &Call::gate_low_rows, block);
    this->announce_low_rows(Access::write, &Call::up_low_rows, block);
    if (needs_acts()) {
      this->announce_panel(Access::read, &Call::act_panel, block, S.intermediate);
      this->announce_low(Access::write, &Call::down_low, block);
      this->announce_low_rows(Access::write, &Call::down_in_rows, block);
    }
  }

  void x_grad(const Segment& segment, const Next& next, int64_t strip) const {
    const int64_t column = strip * kStrip;
    const int64_t columns = smaller(kStrip, S.hidden - column);
    this->announce_product(segment, 2);
    if (call.sums) {
      announce_x_grad(segment);
      float* sum = scratch.strip(0, segment.rows);
      gate_up_product(segment, next, strip, sum);
      if constexpr (kTraced) observe_strip(call, Observed::dx, segment, strip, S.hidden, sum);
      this->add_to_tokens(segment, strip, sum, 0);
    }
    if (wants_lora()) add_hidden_grads(segment, column, columns);
  }

  void announce_x_grad(const Segment& segment) const {
    this->announce_panel(Access::read, &Call::gate_panel, segment, S.intermediate);
    this->announce_panel(Access::read, &Call::up_panel, segment, S.intermediate);
    this->announce_low(Access::read, &Call::gate_low, segment);
    this->announce_low(Access::read, &Call::up_low, segment);
  }

  // sum = [dgate | s dgate B] . [W_gate ; A] and the same of up, for 32 columns of H.
  void gate_up_product(const Segment& segment, const Next& next, int64_t strip, float* sum) const {
    const bf16* gate = this->gate_strip(segment.expert, 0) + strip * kBlockElements;
    const bf16* up = this->up_strip(segment.expert, 0) + strip * kBlockElements;
    const bf16* following = this->gate_strip(next.expert, 0) + next.strip * kBlockElements;
    SumStart start = start_of_a(segment, call.gate_low, this->gate_a(segment.expert), strip, S.hidden);
    multiply_back(segment, call.gate_panel, gate, up, start, sum);
    start = start_of_a(segment, call.up_low, this->up_a(segment.expert), strip, S.hidden);
    multiply_back(segment, call.up_panel, up, following,
                  SumStart::strip(sum).with_lora(start.low, start.lora, start.rank), sum);
    const Lap<S> lap(scratch, Step::x_grad);
    Gemm::to_natural_order(sum, segment.rows);
  }

  void multiply_back(const Segment& segment, void* panel, const bf16* blocks, const bf16* next,
                     const SumStart& start, float* sum) const {
    const Lap<S> lap(scratch, Step::x_grad);
    const Weights weights{blocks, next, packed_elements(kStrip, S.hidden)};
    Gemm::backward(this->panel(panel, segment.block, S.intermediate), segment.rows, S.intermediate, weights,
                   start, sum, scratch.weights);
  }

  // Gradients of the three parameters that have H as an axis.
  void add_hidden_grads(const Segment& segment, int64_t column, int64_t columns) const {
    this->announce_low_rows(Access::read, &Call::gate_low_rows, segment);
    this->announce_low_rows(Access::read, &Call::up_low_rows, segment);
    announce_in_rows(Access::read, &Call::down_in_rows, segment);
    const Lap<S> lap(scratch, Step::lora_grads);
    float* values = scratch.strip(1, segment.rows);
    const auto place = [&](float* grad) { return grad_strip(grad, segment, S.hidden, column, columns); };
    gather_strip(call.x, nullptr, segment, column, columns, values);
    add_a_grad<Gemm>(this->low_rows(call.gate_low_rows, segment.row), segment.rows, call.rank, values,
                     place(call.gate_lora_a_grad), scratch.lora);
    add_a_grad<Gemm>(this->low_rows(call.up_low_rows, segment.row), segment.rows, call.rank, values,
                     place(call.up_lora_a_grad), scratch.lora);
    gather_strip(call.out_grad, call.row_weight + segment.row, segment, column, columns, values);
    add_b_grad<Gemm>(in_rows(call.saved_down_u, call.down_in_rows, segment.row), segment.rows, call.rank,
                     values, place(call.down_lora_b_grad), scratch.lora);
  }

  // 32 columns of the tokens of a segment as float32, times their weights where there are any.
  void gather_strip(const bf16* tokens, const float* weights, const Segment& segment, int64_t column,
                    int64_t columns, float* strip) const {
    announce<S>(call, Access::write, &Call::thread_rows, scratch.rows, segment.rows * kStrip * sizeof(bf16));
    call.gather_rows(tokens, S.hidden, call.row_token + segment.row, segment.rows, column, columns,
                     scratch.rows, kStrip);
    for (int64_t row = 0; row < segment.rows; ++row) {
      const float weight = weights ? weights[row] : 1.0f;
      for (int64_t c = 0; c < kStrip; ++c)
        strip[row * kStrip + c] = weight * to_float(scratch.rows[row * kStrip + c]);
    }
    clear_padding(strip, segment.rows, columns);
  }
};

template <Shape S, class Gemm>
void backward_group(const Call& call, const Group& group, const ThreadScratch& scratch) {
  const BackwardSteps<S, Gemm> steps{{call, group, scratch}};
  enter_step<S>(call, BackwardStep::load);
  for_each_block<S>(group, [&](const Block& block) { steps.load(block); });
  enter_step<S>(call, BackwardStep::gate_up);
  if (steps.recomputes())
    for_each_segment_strip(group, S.intermediate,
                           [&](const Segment& segment, int64_t strip) { steps.recompute(segment, strip); });
  enter_step<S>(call, BackwardStep::act_grad);
  for_each_segment_strip(group, S.intermediate,
                         [&](const Segment& segment, int64_t strip) { steps.act_grad(segment, strip); });
  enter_step<S>(call, BackwardStep::low_grads);
  for_each_block<S>(group, [&](const Block& block) { steps.low_grads(block); });
  enter_step<S>(call, BackwardStep::x_grad);
  for_each_strip(group, S.hidden, [&](const Segment& segment, const Next& next, int64_t strip) {
    steps.x_grad(segment, next, strip);
  });
}

}  // namespace jitmoe
