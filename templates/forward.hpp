// Forward, for the rows of one expert (oracle/reference.py says the same in torch):
//
//   load        u = s x A^T of gate and up
//   gate_up     gate, up = x W^T + u B^T;  a = act(gate) * up          32 columns of I
//   down_low    u = s a A^T of down
//   down        out[token] += weight * (a W^T + u B^T)                 32 columns of H
#pragma once
#include "activation.hpp"
#include "pass.hpp"

namespace jitmoe {

enum class ForwardStep { load, gate_up, down_low, down };  // FORWARD_STEPS in plan/scratch.py

// Every function is one item of work.
template <Shape S, class Gemm>
struct Forward : Pass<S, Gemm> {
  using Base = Pass<S, Gemm>;
  using Base::call, Base::gate, Base::up, Base::down, Base::thread;
  using Base::gather, Base::make_u, Base::copy_u, Base::shares_a, Base::project, Base::add_to_tokens;
  using Base::strip, Base::saved_u, Base::saved_strip, Base::store_bf16, Base::put, Base::show;

  void load(const Block& block) const {
    load_x(block, {saved_u(call.gate, block), nullptr, nullptr}, {saved_u(call.up, block), nullptr, nullptr});
  }

  void load_x(const Block& block, const LowRankRows& gate_u, const LowRankRows& up_u) const {
    gather(Tensor::x, call.x, block, call.x_panel);
    make_u(gate, call.x_panel, block, gate_u);
    if (shares_a())
      copy_u(gate, gate_u, up, up_u, block);
    else
      make_u(up, call.x_panel, block, up_u);
  }

  void gate_up(const Segment& segment, int64_t index) const {
    gate_up(segment, index, saved_strip(call.gate, segment, index), saved_strip(call.up, segment, index),
            true);
  }

  // Gate and up go where `gate_to` and `up_to` point, if not null; a into its panel if it is wanted.
  void gate_up(const Segment& segment, int64_t index, bf16* gate_to, bf16* up_to, bool wants_act) const {
    float* gates = strip(0, segment);
    float* ups = strip(1, segment);
    project(gate, call.x_panel, segment, index, up.strip(segment.expert, index), gates);
    project(up, call.x_panel, segment, index, gate.strip(segment.expert, index + 1), ups);
    const Lap<S> lap(thread.clocks, Phase::activation);
    if (gate_to) {
      store_bf16(gates, segment.rows, gate_to);
      store_bf16(ups, segment.rows, up_to);
    }
    if (!wants_act) return;
    const ActivationNumbers numbers = this->numbers();
#pragma omp simd
    for (int64_t i = 0; i < segment.rows * kStrip; ++i)
      gates[i] = round_to_bf16(ActivationOf<S.activation>::value(gates[i], ups[i], numbers));
    show(Tensor::act, segment, index, S.intermediate, gates);
    put(gates, segment, index, call.act_panel);
  }

  void down_low(const Block& block) const {
    make_u(down, call.act_panel, block, {saved_u(call.down, block), nullptr, nullptr});
  }

  void add_down(const Segment& segment, const Following& following, int64_t index) const {
    float* result = strip(0, segment);
    project(down, call.act_panel, segment, index, down.strip(following.expert, following.strip), result);
    add_to_tokens(segment, index, result, true);
  }
};

template <Shape S, class Gemm>
void forward_group(const Call& call, const Group& group, const Thread& thread) {
  const Forward<S, Gemm> pass{{{call, group, thread}}};
  for_each_block<S>(call, group, thread, ForwardStep::load, [&](const Block& block) { pass.load(block); });
  for_each_segment_strip<S>(call, group, thread, S.intermediate, ForwardStep::gate_up,
                            [&](const Segment& segment, int64_t strip) { pass.gate_up(segment, strip); });
  if (call.rank)
    for_each_block<S>(call, group, thread, ForwardStep::down_low,
                      [&](const Block& block) { pass.down_low(block); });
  for_each_strip<S>(call, group, thread, S.hidden, ForwardStep::down,
                    [&](const Segment& segment, const Following& following, int64_t strip) {
                      pass.add_down(segment, following, strip);
                    });
}

}  // namespace jitmoe
