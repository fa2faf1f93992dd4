// Backward with a frozen base, for the rows of one expert; dv is the gradient of v, w the routing weight of the row:
//
//   load        du = s dout B of down; with recomputation x and u of gate and up again
//   gate_up     gate and up again, only with recomputation                             32 columns of I
//   act_grad    da = dout W + du A of down;  dgate, dup = w da (act(gate) * up)';      32 columns of I
//               gradients of down A += w du^T a, gate B += dgate^T u, up B += dup^T u
//   low_grads   du = s dgate B of gate, s dup B of up;  dw = <da, a> + <dout, bias>; with recomputation u of down again
//   x_grad      dx[token] += dgate W + du A of gate, dup W + du A of up                 32 columns of H
//               gradients of gate A += du^T x, up A += du^T x, down B += w dout^T u
//
// LoRA gradients are taken where their strip of 32 columns is at hand: each column belongs to one item,
// and the rows of an expert are added in order, group after group.
#pragma once
#include "forward.hpp"

namespace jitmoe {

enum class BackwardStep { load, gate_up, act_grad, low_grads, x_grad };  // BACKWARD_STEPS in plan/scratch.py

template <Shape S, class Gemm>
struct Backward : Forward<S, Gemm> {
  using Base = Forward<S, Gemm>;
  using Base::add_a_grad, Base::add_b_grad, Base::add_to_tokens, Base::kActStrips;
  using Base::call, Base::gate, Base::up, Base::down, Base::group, Base::thread, Base::kTraced;
  using Base::gather, Base::operand, Base::gather_operand, Base::load_x, Base::make_u, Base::make_du;
  using Base::load_bf16, Base::clear_padding, Base::put, Base::show, Base::width;
  using Base::project_back, Base::project_gate_up_back, Base::left;
  using Base::strip, Base::rows, Base::saved_u, Base::saved_strip, Base::again_strip;
  using typename Base::Form;

  bool recomputes() const { return !call.gate.saved; }
  bool wants_lora() const { return call.rank && call.gate.a_grad.data; }
  // Once more as forward had them, for u = s a A^T.
  bool needs_acts() const { return recomputes() && wants_lora(); }

  // Whether the left operands of B's gradients are made here, not by forward.
  bool makes_u() const { return Form::kPairs || recomputes(); }

  // u of some rows: what forward saved, or what this pass made.
  template <class Item>
  const float* u_rows(const Projection& of, const Item& item) const {
    return makes_u() ? left(Access::read, of.u_rows, item) : saved_u(of, item);
  }
  LowRankRows to_u_rows(const Projection& of, const Block& block, const float* weights) const {
    if (!call.rank) return {};
    return {nullptr, left(Access::write, of.u_rows, block), weights};
  }
  // Factors of u of down, where its gradient takes them from there.
  const float* weights_of_u(const Block& block) const {
    return Form::kPairs ? call.row_weight + block.row : nullptr;
  }
  // Gate or up of a strip, likewise.
  const bf16* value(const Projection& of, const Segment& segment, int64_t index) const {
    return recomputes() ? again_strip(Access::read, of, segment, index) : saved_strip(of, segment, index);
  }

  void load(const Block& block) const {
    gather(Tensor::dout, call.out_grad, block, call.out_panel);
    if constexpr (S.bias) add_bias_dots(block);
    make_du(down, call.out_panel, block, call.row_weight + block.row);
    if (recomputes()) {
      load_x(block, to_u_rows(call.gate, block, nullptr), to_u_rows(call.up, block, nullptr));
    } else if (wants_lora()) {
      if constexpr (kTraced) observe_saved<S>(call, block, thread.rows);
      if constexpr (Form::kPairs) load_saved_u(block);
    }
  }

  void load_saved_u(const Block& block) const {
    const Lap<S> lap(thread.clocks, Phase::low_rank);
    const auto load = [&](const Projection& of, const float* weights) {
      Form::left_of_saved(saved_u(of, block), block.rows, call.rank, weights,
                          left(Access::write, of.u_rows, block));
    };
    load(call.gate, nullptr);
    load(call.up, nullptr);
    load(call.down, weights_of_u(block));
  }

  // The part <dout, bias of down> of dw, from the rows that were just gathered.
  void add_bias_dots(const Block& block) const {
    constexpr int64_t stride = round_up(S.hidden, kKStep);
    const float* bias = call.down.bias + block.segment->expert * S.hidden;
    for (int64_t row = 0; row < block.rows; ++row) {
      const bf16* dout = thread.rows + row * stride;
      float lanes[kStrip] = {};
      for (int64_t c = 0; c < S.hidden; ++c) lanes[c % kStrip] += to_float(dout[c]) * bias[c];
      call.weights_grad[call.row_slot[block.row + row]] = tree_sum<kStrip>(lanes);
    }
  }

  void recompute(const Segment& segment, int64_t index) const {
    this->gate_up(segment, index, again_strip(Access::write, call.gate, segment, index),
                  again_strip(Access::write, call.up, segment, index), needs_acts());
  }

  void act_grad(const Segment& segment, int64_t index) const {
    float* das = strip(0, segment);
    float* acts = strip(1, segment);
    float* gates = strip(2, segment);
    float* ups = strip(3, segment);
    project_back(down, call.out_panel, segment, index, down.column(segment.expert, index + 1), false, das);
    Gemm::to_natural_order(das, segment.rows);
    show(Tensor::dact, segment, index, S.intermediate, das);
    through_activation(segment, index, das, acts, gates, ups);
    if (!wants_lora()) return;
    const float* du = left(Access::read, call.down.du_rows, segment);
    const float* gate_u = u_rows(call.gate, segment);
    const float* up_u = u_rows(call.up, segment);
    const Lap<S> lap(thread.clocks, Phase::lora_grads);
    add_a_grad(down, du, segment, index, operand(acts, segment, das));  // nobody reads da any more
    add_b_grad(gate, gate_u, segment, index, operand(gates, segment, das));
    add_b_grad(up, up_u, segment, index, operand(ups, segment, das));
  }

  // From da: a, dgate and dup, of which the latter also go into their panels, and a part of dw.
  void through_activation(const Segment& segment, int64_t index, float* das, float* acts, float* gates,
                          float* ups) const {
    const int64_t columns = width(S.intermediate, index);
    const bf16* gate_values = value(call.gate, segment, index);
    const bf16* up_values = value(call.up, segment, index);
    float* parts = rows(Access::write, call.dot_parts, segment, kActStrips);
    const Lap<S> lap(thread.clocks, Phase::activation);
    load_bf16(gate_values, segment.rows, columns, gates);
    load_bf16(up_values, segment.rows, columns, ups);
    if (!recomputes()) {
      show(Tensor::gate, segment, index, S.intermediate, gates);
      show(Tensor::up, segment, index, S.intermediate, ups);
    }
    clear_padding(das, segment.rows, columns);
    const ActivationNumbers numbers = this->numbers();
    for (int64_t row = 0; row < segment.rows; ++row) {
      const int64_t at = row * kStrip;
      activation_grad(numbers, call.row_weight[segment.row + row], das + at, acts + at, gates + at, ups + at);
      parts[row * kActStrips + index] = tree_sum<kStrip>(das + at);
    }
    if (!needs_acts()) show(Tensor::act, segment, index, S.intermediate, acts);
    show(Tensor::dgate, segment, index, S.intermediate, gates);
    show(Tensor::dup, segment, index, S.intermediate, ups);
    put(gates, segment, index, call.gate.grad_panel);
    put(ups, segment, index, call.up.grad_panel);
  }

  // One row of 32 columns, in place: da, gate and up become da * a, dgate and dup; a is written beside them.
  static void activation_grad(const ActivationNumbers& numbers, float weight, float* das, float* acts,
                              float* gates, float* ups) {
#pragma omp simd
    for (int64_t c = 0; c < kStrip; ++c) {
      const ActivationGradient result = ActivationOf<S.activation>::gradient(gates[c], ups[c], numbers);
      const float a = round_to_bf16(result.value);
      gates[c] = weight * das[c] * result.by_gate;
      ups[c] = weight * das[c] * result.by_up;
      das[c] = das[c] * a;
      acts[c] = a;
    }
  }

  void low_grads(const Block& block) const {
    add_dot_parts(block);
    make_du(gate, call.gate.grad_panel, block, nullptr);
    make_du(up, call.up.grad_panel, block, nullptr);
    if (needs_acts()) make_u(down, call.act_panel, block, to_u_rows(call.down, block, weights_of_u(block)));
  }

  void add_dot_parts(const Block& block) const {
    const float* parts = rows(Access::read, call.dot_parts, block, kActStrips);
    const Lap<S> lap(thread.clocks, Phase::low_rank);
    for (int64_t row = 0; row < block.rows; ++row, parts += kActStrips) {
      float& grad = call.weights_grad[call.row_slot[block.row + row]];
      float sum = S.bias ? grad : 0.0f;
      for (int64_t strip = 0; strip < kActStrips; ++strip) sum += parts[strip];
      grad = sum;
    }
  }

  void x_grad(const Segment& segment, const Following& following, int64_t index) const {
    if (call.sums) {
      float* dx = strip(0, segment);
      project_gate_up_back(segment, following, index, dx);
      Gemm::to_natural_order(dx, segment.rows);
      show(Tensor::dx, segment, index, S.hidden, dx);
      add_to_tokens(segment, index, dx, false);
    }
    if (wants_lora()) add_hidden_grads(segment, index);
  }

  // Gradients of the three parameters that have H as an axis.
  void add_hidden_grads(const Segment& segment, int64_t index) const {
    const float* gate_du = left(Access::read, call.gate.du_rows, segment);
    const float* up_du = left(Access::read, call.up.du_rows, segment);
    const float* down_u = u_rows(call.down, segment);
    float* room = strip(1, segment);
    const Lap<S> lap(thread.clocks, Phase::lora_grads);
    const float* x = gather_operand(call.x, nullptr, segment, index, room);
    add_a_grad(gate, gate_du, segment, index, x);
    add_a_grad(up, up_du, segment, index, x);
    const float* dout = gather_operand(call.out_grad, call.row_weight + segment.row, segment, index, room);
    add_b_grad(down, down_u, segment, index, dout);
  }
};

template <Shape S, class Gemm>
void backward_group(const Call& call, const Group& group, const Thread& thread) {
  const Backward<S, Gemm> pass{{{{call, group, thread}}}};
  for_each_block<S>(call, group, thread, BackwardStep::load, [&](const Block& block) { pass.load(block); });
  if (pass.recomputes())
    for_each_segment_strip<S>(call, group, thread, S.intermediate, BackwardStep::gate_up,
                              [&](const Segment& segment, int64_t strip) { pass.recompute(segment, strip); });
  for_each_segment_strip<S>(call, group, thread, S.intermediate, BackwardStep::act_grad,
                            [&](const Segment& segment, int64_t strip) { pass.act_grad(segment, strip); });
  for_each_block<S>(call, group, thread, BackwardStep::low_grads,
                    [&](const Block& block) { pass.low_grads(block); });
  for_each_strip<S>(call, group, thread, S.hidden, BackwardStep::x_grad,
                    [&](const Segment& segment, const Following& following, int64_t strip) {
                      pass.x_grad(segment, following, strip);
                    });
}

}  // namespace jitmoe
