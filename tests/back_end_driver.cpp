// One product of a back end, for test_back_end.py: rows and weights as they are outside, packed and multiplied here.
#include <vector>

#include "gemm/tuning.hpp"
#include "layer.hpp"

using namespace jitmoe;

constexpr Shape shape{
    .isa = Isa::DRIVEN_ISA,
    .hidden = 64,
    .intermediate = 64,
    .padded_rank = 0,
    .m_step = DRIVEN_M_STEP,
    .lora_bf16 = false,
    .activation = Activation::silu,
    .watch = Watch::nothing,
};
using Gemm = BackEndOf<shape>::type;
static_assert(check_instance<shape>());

// strip = start + rows [count, k] . weights, which are [32, k] in forward and [k, 32] in backward. `kind` is 0 for zeros,
// 1 for a bias and 2 for a strip. A null `from` is the strip itself.
extern "C" void jitmoe_multiply(int forward, const bf16* rows, int64_t count, int64_t k, const bf16* weights,
                                int kind, const float* from, float* strip) {
  std::vector<bf16> packed(packed_elements(forward ? kStrip : k, forward ? k : kStrip));
  pack(weights, packed.data(), 1, forward ? kStrip : k, forward ? k : kStrip, 1);
  const RowBlocks blocks(count, shape.m_step);
  std::vector<Gemm::Operand> panel(blocks.count * Gemm::block_elements(k) + 64);
  const ThreadState<Gemm> state;
  const int64_t stride = round_up(k, kKStep);
  for (int64_t b = 0; b < blocks.count; ++b)
    Gemm::pack_rows(rows + blocks.begin(b) * stride, stride, blocks.size(b), k,
                    panel.data() + b * Gemm::block_elements(k));
  std::vector<float> scratch((kChunk + round_up(k, kKStep)) * kStrip);
  if (!from) from = strip;
  const SumStart start = kind == 0   ? SumStart::zeros()
                         : kind == 1 ? SumStart::bias(from)
                                     : SumStart::strip(from);
  const Weights<shape> blocks_of_w{packed.data(), nullptr, kBlockElements};
  if (forward) {
    Gemm::forward(panel.data(), count, k, blocks_of_w, start, strip, scratch.data());
  } else {
    Gemm::backward(panel.data(), count, k, blocks_of_w, start, strip, scratch.data());
    Gemm::to_natural_order(strip, count);
  }
}
