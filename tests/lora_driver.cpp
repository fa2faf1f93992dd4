// LoRA of a back end in its own form, for test_lora_forms.py: u of some rows, the K-step that follows, and a gradient.
#include <vector>

#include "gemm/tuning.hpp"
#include "layer.hpp"

using namespace jitmoe;

constexpr Shape shape{
    .isa = Isa::DRIVEN_ISA,
    .hidden = 96,
    .intermediate = 64,
    .padded_rank = 64,
    .m_step = DRIVEN_M_STEP,
    .lora_bf16 = false,
    .activation = Activation::silu,
    .watch = Watch::nothing,
};
using Gemm = BackEndOf<shape>::type;
using Form = LoraFormOf<shape, Gemm>::type;
using View = LoraMatrix<shape>::View;
static_assert(check_instance<shape>());

// From x [rows, 96] in bfloat16, a [rank, 96] and b [32, rank]:
//
//   u [rows, rank] = scale * x a^T
//   product [rows, 32] = u b^T
//   grads [2, rank, 32] = (u weights)^T values, values [rows, 32] in bfloat16: as a gradient of A, as one of B
extern "C" void jitmoe_lora(const bf16* x, int64_t rows, const float* a, const float* b, int64_t rank,
                            float scale, const float* weights, const bf16* values, float* u, float* product,
                            float* grads) {
  const ThreadState<Gemm> state;
  const RowBlocks blocks(rows, shape.m_step);
  const int64_t k = shape.hidden, low = Form::low_floats(rank);
  // The largest form's scratch: that of tiles.
  std::vector<Gemm::Operand> panel(blocks.count * Gemm::block_elements(k) + 64);
  std::vector<float> lows(blocks.count * low + 64), lefts((blocks.count + 1) * (rank + 16) * 512);
  std::vector<float> lora(rank * kStrip * 8 + 4096), pairs((rows + 32) * kStrip);
  std::vector<float> decoded(rows * kStrip);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = blocks.begin(block);
    Gemm::Operand* operand = panel.data() + block * Gemm::block_elements(k);
    Gemm::pack_rows(x + first * k, k, blocks.size(block), k, operand);
    Form::low_rank(operand, blocks.size(block), k, View{a, 1, k}, rank, scale, lows.data() + block * low,
                   {u + first * rank, nullptr, nullptr});
    Form::low_rank(operand, blocks.size(block), k, View{a, 1, k}, rank, scale, lows.data() + block * low,
                   {nullptr, lefts.data() + Form::left_floats(first, block, rank), weights + first});
  }
  load_rows<shape, Gemm>(LoraMatrix<shape>({b, 0, rank, 1}, 0), rank, 0, kStrip, lora.data());
  // A contraction over nothing but LoRA.
  const std::vector<bf16> zeros(kBlockElements);
  std::vector<Gemm::Operand> nothing(blocks.count * Gemm::block_elements(kKStep) + 64);
  std::vector<float> scratch(kChunk * kStrip * 2);
  const Weights<shape> none{zeros.data(), nullptr, kBlockElements};
  Gemm::forward(nothing.data(), rows, kKStep, none,
                SumStart::zeros().with_lora(lows.data(), Form::right(lora.data(), rank, 0), rank), product,
                scratch.data());
  for (int64_t i = 0; i < rows * kStrip; ++i) decoded[i] = to_float(values[i]);
  for (int64_t exact = 0; exact < 2; ++exact)
    Form::add_grad(lefts.data(), rows, rank, exact == 0, Form::operand(decoded.data(), rows, pairs.data()),
                   {grads + exact * rank * kStrip, kStrip, 1, kStrip, true}, lora.data());
}
