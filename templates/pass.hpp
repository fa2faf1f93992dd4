// The vocabulary of the two passes: what one thread does with row blocks, segments and strips of one group.
//
// A step of a pass is a few of these words. Each asks for what it reads and writes by `panel`, `strip` and so on, which
// tell a checked instance; measures itself in a timed one; and shows a traced one what it computed. The steps in
// forward.hpp and backward.hpp know nothing of that.
#pragma once
#include "places.hpp"
#include "projection.hpp"
#include "watch/traced.hpp"

namespace jitmoe {

// A fixed tree: the same bits on every compiler's vector width.
template <int64_t N>
float tree_sum(float* values) {
  if constexpr (N == 1) return values[0];
  for (int64_t i = 0; i < N / 2; ++i) values[i] += values[i + N / 2];
  return tree_sum<(N > 1 ? N / 2 : 1)>(values);
}

template <Shape S, class Gemm>
struct Pass : Places<S, Gemm> {
  using Base = Places<S, Gemm>;
  using Base::call, Base::group, Base::thread;
  using Base::panel, Base::low, Base::rows, Base::left, Base::strip, Base::gathered, Base::lora_strip,
      Base::expanded;
  using typename Base::Form, typename Base::Operand;
  using Lora = LoraMatrix<S>;
  static constexpr bool kTraced = S.watch == Watch::values;
  static constexpr int64_t kActStrips = ceil_div(S.intermediate, kStrip);

  const ProjectionOf<S, Name::gate> gate{call.gate};
  const ProjectionOf<S, Name::up> up{call.up};
  const ProjectionOf<S, Name::down> down{call.down};

  // Tokens to rows, and back.

  void gather(Tensor what, const bf16* tokens, const Block& block, void* const& target) const {
    constexpr int64_t stride = round_up(S.hidden, kKStep);
    bf16* rows = gathered(block.rows * stride);
    {
      const Lap<S> lap(thread.clocks, Phase::gather);
      call.gather_rows(tokens, S.hidden, call.row_token + block.row, block.rows, 0, S.hidden, rows, stride);
      for (int64_t row = 0; row < block.rows; ++row)
        for (int64_t c = S.hidden; c < stride; ++c) rows[row * stride + c] = 0;
    }
    if constexpr (kTraced) observe_rows<S>(call, what, block, rows, stride);
    const Lap<S> lap(thread.clocks, Phase::pack);
    Gemm::pack_rows(rows, stride, block.rows, S.hidden, panel(Access::write, target, block, S.hidden));
  }

  // 32 columns of the tokens of a segment as float32, times their weights where there are any.
  void gather_strip(const bf16* tokens, const float* weights, const Segment& segment, int64_t column,
                    int64_t columns, float* strip) const {
    bf16* rows = gathered(segment.rows * kStrip);
    call.gather_rows(tokens, S.hidden, call.row_token + segment.row, segment.rows, column, columns, rows,
                     kStrip);
    for (int64_t row = 0; row < segment.rows; ++row) {
      const float weight = weights ? weights[row] : 1.0f;
      for (int64_t c = 0; c < kStrip; ++c)
        strip[row * kStrip + c] = weight * to_float(rows[row * kStrip + c]);
    }
    clear_padding(strip, segment.rows, columns);
  }

  // A strip of results to the sums of its tokens, times the routing weights where `weighted`.
  void add_to_tokens(const Segment& segment, int64_t strip, const float* values, bool weighted) const {
    float* sums = sums_of<S>(call, Access::read, strip);
    const Lap<S> lap(thread.clocks, Phase::combine);
    call.sum_rows(values, kStrip, call.row_token + segment.row, call.row_weight + segment.row, weighted,
                  segment.rows, 0, smaller(kStrip, S.hidden - strip * kStrip), sums, kStrip);
  }

  // Low-rank products: u = s v A^T with v [rows, in], du = s dv B with dv [rows, out].

  template <class P>
  void make_u(const P& of, void* const& v_panel, const Block& block, const LowRankRows& to) const {
    low_rank(P::kU, of.at, v_panel, block, P::kIn, lora(of.at.a, block).along_columns(), to);
  }
  // Where gate and up have one A, their u is one product too.
  bool shares_a() const {
    const auto &one = call.gate.a, &other = call.up.a;
    return one.data == other.data && one.expert == other.expert && one.row == other.row &&
           one.column == other.column;
  }
  template <class P, class Q>
  void copy_u(const P& from, const LowRankRows& from_rows, const Q& to, const LowRankRows& to_rows,
              const Block& block) const {
    if (!call.rank) return;
    const float* product = low(Access::read, from.at, block);
    float* copy = low(Access::write, to.at, block);
    std::memcpy(copy, product, Form::low_floats(call.rank) * sizeof(float));
    if (to_rows.saved) std::memcpy(to_rows.saved, from_rows.saved, block.rows * call.rank * sizeof(float));
    if (to_rows.left)
      std::memcpy(to_rows.left, from_rows.left, Form::left_floats(block.rows, 1, call.rank) * sizeof(float));
    if constexpr (kTraced) observe_low(Q::kU, block, copy);
  }
  template <class P>
  void make_du(const P& of, void* const& dv_panel, const Block& block, const float* row_weight) const {
    if (!call.rank) return;
    low_rank(P::kDu, of.at, dv_panel, block, P::kOut, lora(of.at.b, block).along_rows(),
             {nullptr, left(Access::write, of.at.du_rows, block), row_weight});
  }
  void low_rank(Tensor what, const Projection& of, void* const& v_panel, const Block& block, int64_t k,
                typename Lora::View matrix, const LowRankRows& to) const {
    if (!call.rank) return;
    float* product = low(Access::write, of, block);
    const Operand* v = panel(Access::read, v_panel, block, k);
    const Lap<S> lap(thread.clocks, Phase::low_rank);
    Form::low_rank(v, block.rows, k, matrix, call.rank, static_cast<float>(call.scale), product, to);
    if constexpr (kTraced) observe_low(what, block, product);
  }
  void observe_low(Tensor what, const Block& block, const float* product) const {
    jitmoe::observe_low<S>(call, what, block,
                           [&](int64_t row, int64_t r) { return Form::low_at(product, call.rank, row, r); });
  }
  static Lora lora(const Matrices<const void>& of, const Block& block) { return {of, block.segment->expert}; }

  // Base products with their LoRA K-step, 32 columns at a time.

  // v W^T + u B^T = [v | u] . [W | B]^T for a strip of outputs; `next` is what this thread multiplies with after it.
  template <class P>
  void project(const P& of, void* const& v_panel, const Segment& segment, int64_t strip,
               const typename P::Item* next, float* result) const {
    const Weights<S> weights = of.strip_weights(segment.expert, strip, next);
    alignas(64) float room[kStrip];
    const SumStart start =
        with_lora(start_of(of, segment.expert, strip, room), of.at, segment, 0, [&](float* b) {
          load_rows<S, Gemm>({of.at.b, segment.expert}, call.rank, strip * kStrip, width(P::kOut, strip), b);
        });
    const Operand* v = panel(Access::read, v_panel, segment, P::kIn);
    float* scratch = expanded();
    {
      const Lap<S> lap(thread.clocks, P::kForward);
      Gemm::forward(v, segment.rows, P::kIn, weights, start, result, scratch);
    }
    if constexpr (kTraced) observe_strip(call, P::kValue, segment, strip, P::kOut, result);
  }

  // dv W + du A = [dv | du] . [W ; A] for 32 inputs, added to what the strip holds where `add`. The lanes of the result
  // are in the back end's order.
  template <class P>
  void project_back(const P& of, void* const& dv_panel, const Segment& segment, int64_t strip,
                    const typename P::Item* next, bool add, float* result) const {
    const SumStart from = add ? SumStart::strip(result) : SumStart::zeros();
    const Contraction<S, Gemm> one = contraction(of, dv_panel, segment, strip, next, 0, from);
    float* scratch = expanded();
    const Lap<S> lap(thread.clocks, P::kBackward);
    Gemm::backward(one.panel, segment.rows, P::kOut, one.weights, one.start, result, scratch);
  }
  // The same of gate and up, which add: one contraction where the back end has it.
  void project_gate_up_back(const Segment& segment, const Following& following, int64_t strip,
                            float* result) const {
    const auto *gates = gate.column(following.expert, following.strip),
               *ups = up.column(following.expert, following.strip);
    if constexpr (AddsContractions<Gemm, S>) {
      const SumStart zeros = SumStart::zeros();
      const Contraction<S, Gemm> both[] = {
          contraction(gate, call.gate.grad_panel, segment, strip, gates, 0, zeros),
          contraction(up, call.up.grad_panel, segment, strip, ups, 1, zeros)};
      float* scratch = expanded();
      const Lap<S> lap(thread.clocks, Phase::x_grad);
      Gemm::backward(both, segment.rows, S.intermediate, result, scratch);
    } else {
      project_back(gate, call.gate.grad_panel, segment, strip, up.column(segment.expert, strip), false,
                   result);
      project_back(up, call.up.grad_panel, segment, strip, gates, true, result);
    }
  }
  template <class P>
  Contraction<S, Gemm> contraction(const P& of, void* const& dv_panel, const Segment& segment, int64_t strip,
                                   const typename P::Item* next, int64_t index, const SumStart& from) const {
    const Weights<S> weights = of.column_weights(segment.expert, strip, next);
    const SumStart start = with_lora(from, of.at, segment, index, [&](float* a) {
      load_columns<S, Gemm>({of.at.a, segment.expert}, call.rank, strip * kStrip, width(P::kIn, strip), a);
    });
    return {panel(Access::read, dv_panel, segment, P::kOut), weights, start};
  }

  // Zeros, or the bias of a strip of outputs; where the strip is the last one, in `room` and padded.
  template <class P>
  static SumStart start_of(const P& of, int64_t expert, int64_t strip, float (&room)[kStrip]) {
    if constexpr (!S.bias) return SumStart::zeros();
    const float* bias = of.at.bias + expert * P::kOut + strip * kStrip;
    const int64_t columns = width(P::kOut, strip);
    if (columns == kStrip) return SumStart::bias(bias);
    for (int64_t c = 0; c < kStrip; ++c) room[c] = c < columns ? bias[c] : 0.0f;
    return SumStart::bias(room);
  }

  // `start` and the LoRA K-step, the `index`-th of a contraction: low-rank rows times what `load` puts into a strip of
  // this thread.
  template <class Load>
  SumStart with_lora(const SumStart& start, const Projection& of, const Segment& segment, int64_t index,
                     Load&& load) const {
    float* matrix = lora_strip();
    const float* left = low(Access::read, of, segment);
    const Lap<S> lap(thread.clocks, Phase::low_rank);
    load(matrix);
    return start.with_lora(left, Form::right(matrix, call.rank, index), call.rank);
  }

  // Strips: columns of a matrix inside its last strip, and ways in and out.

  static int64_t width(int64_t columns, int64_t strip) { return smaller(kStrip, columns - strip * kStrip); }

  void put(const float* strip, const Segment& segment, int64_t index, void* const& target) const {
    Operand* at = panel(Access::write, target, segment, S.intermediate);
    const RowBlocks blocks(segment.rows, S.m_step);
    for (int64_t b = 0; b < blocks.count; ++b)
      Gemm::pack_strip(strip + blocks.begin(b) * kStrip, blocks.size(b), index * kStrip,
                       width(S.intermediate, index), S.intermediate,
                       at + b * Gemm::block_elements(S.intermediate));
  }
  static void store_bf16(const float* strip, int64_t rows, bf16* target) {
    for (int64_t i = 0; i < rows * kStrip; ++i) target[i] = to_bf16(strip[i]);
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
  ActivationNumbers numbers() const {
    return {static_cast<float>(call.alpha), static_cast<float>(call.limit)};
  }
  void show(Tensor what, const Segment& segment, int64_t strip, int64_t columns, const float* values) const {
    if constexpr (kTraced) observe_strip(call, what, segment, strip, columns, values);
  }

  // Gradients of LoRA: += low-rank rows^T . strip. `values` are of `operand` or `gather_operand`.

  const float* operand(const float* strip, const Segment& segment, float* room) const {
    return Form::operand(strip, segment.rows, room);
  }
  const float* gather_operand(const bf16* tokens, const float* weights, const Segment& segment, int64_t index,
                              float* room) const {
    const int64_t column = index * kStrip, columns = width(S.hidden, index);
    if constexpr (Form::kPairs) {
      bf16* rows = gathered(segment.rows * kStrip);
      call.gather_rows(tokens, S.hidden, call.row_token + segment.row, segment.rows, column, columns, rows,
                       kStrip);
      return Form::operand(rows, segment.rows, room);
    } else {
      gather_strip(tokens, weights, segment, column, columns, room);
      return room;
    }
  }
  template <class P>
  void add_a_grad(const P& of, const float* du, const Segment& segment, int64_t strip,
                  const float* values) const {
    Form::add_grad(
        du, segment.rows, call.rank, true, values,
        a_strip(of.at.a_grad, segment.expert, strip * kStrip, width(P::kIn, strip), first(segment)),
        lora_strip());
  }
  template <class P>
  void add_b_grad(const P& of, const float* u, const Segment& segment, int64_t strip,
                  const float* values) const {
    Form::add_grad(
        u, segment.rows, call.rank, false, values,
        b_strip(of.at.b_grad, segment.expert, strip * kStrip, width(P::kOut, strip), first(segment)),
        lora_strip());
  }
  bool first(const Segment& segment) const {
    return &segment == call.segments || (&segment)[-1].expert != segment.expert;
  }
};

}  // namespace jitmoe
