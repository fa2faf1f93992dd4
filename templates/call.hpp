// The C ABI: one struct of 8-byte fields for forward and backward. jitmoe/kernels.py mirrors it, and a
// test compares the two.
#pragma once
#include <cstdint>

#include "bf16.hpp"

namespace jitmoe {

inline constexpr int kAbiVersion = 1;

// A run of rows of one expert that is computed together. Row blocks of a group are numbered from 0.
struct Segment {
  int64_t expert;
  int64_t row;    // first row, in the order sorted by expert
  int64_t rows;   // how many
  int64_t block;  // its first row block in the panels of the group
};

using GatherRows = void (*)(const bf16* x, int64_t x_stride, const int64_t* row_token, int64_t rows,
                            int64_t column, int64_t columns, bf16* out, int64_t out_stride);
using SumRows = void (*)(const float* values, int64_t values_stride, const int64_t* row_token,
                         const float* row_weight, int64_t weighted, int64_t rows, int64_t column,
                         int64_t columns, float* out, int64_t out_stride);
using ObserveValues = void (*)(double* record, const float* values, int64_t row, int64_t rows, int64_t column,
                               int64_t columns, int64_t row_stride, int64_t column_stride);

struct Checks;

struct Call {
  // Tensors of the caller; T tokens, S rows (kept slots), H hidden, I intermediate, r rank.
  const bf16* x;             // [T, H]
  const bf16* out_grad;      // [T, H], backward
  const bf16* gate_weights;  // packed, see gemm/interface.hpp
  const bf16* up_weights;
  const bf16* down_weights;
  const void* gate_lora_a;  // [E, r, H]
  const void* gate_lora_b;  // [E, I, r]
  const void* up_lora_a;
  const void* up_lora_b;
  const void* down_lora_a;  // [E, r, I]
  const void* down_lora_b;  // [E, H, r]
  float* gate_lora_a_grad;  // of experts with rows all written, others not; all six null if not wanted
  float* gate_lora_b_grad;
  float* up_lora_a_grad;
  float* up_lora_b_grad;
  float* down_lora_a_grad;
  float* down_lora_b_grad;
  bf16* saved_gate;  // [strips of I, S, 32] before the activation; written by forward where not null
  bf16* saved_up;
  float* saved_gate_u;  // [S, r] s x A^T; null where saved_gate is
  float* saved_up_u;
  float* saved_down_u;  // s a A^T
  bf16* result;         // [T, H] out in forward, the gradient of x in backward; one of the two is null,
  float* result_float;  // both if no gradient of x is wanted
  float* weights_grad;  // [T * K], zero before the call
  // Routing.
  const int64_t* row_token;  // [S]
  const int64_t* row_slot;   // [S]
  const float* row_weight;   // [S]
  const Segment* segments;
  const int64_t* group_segments;  // [groups + 1] ranges of segments that share the scratch at one time
  int64_t groups;
  int64_t tokens;
  int64_t rows;
  int64_t rank;
  int64_t threads;
  double scale;
  GatherRows gather_rows;
  SumRows sum_rows;
  // Scratch, one pointer a buffer; plan.py has sizes and lifetimes. Panels are row block after row block.
  float* sums;       // [strips of H, T, 32] token sums: a strip belongs to one thread
  void* x_panel;     // [rows, H] of x; in backward only where gate and up are computed again
  void* out_panel;   // [rows, H] of the gradient of out
  void* act_panel;   // [rows, I] of a = silu(gate) * up
  void* gate_panel;  // [rows, I] of the gradient before the activation
  void* up_panel;
  float* gate_low;  // low-rank products, [blocks, r, m_step], right operands of the LoRA K-step ...
  float* up_low;
  float* down_low;
  float* gate_low_rows;  // ... and the same as rows [rows, r] for the gradients of A
  float* up_low_rows;
  float* down_low_rows;  // times the routing weight
  float* gate_in_rows;   // [rows, r] of s x A^T for the gradients of B, where forward saved none
  float* up_in_rows;
  float* down_in_rows;  // of s a A^T
  float* dot_parts;     // [rows, strips of I] parts of the gradient of the routing weights
  bf16* group_gate;     // [strips of I, rows, 32] gate and up where they are computed again
  bf16* group_up;
  float* thread_weights;   // of each thread: expanded weights
  float* thread_strips;    // strips of float32 columns
  bf16* thread_rows;       // gathered rows
  float* thread_lora;      // [r, 32] of a LoRA matrix
  int64_t weights_stride;  // bytes from one thread's part to the next one's
  int64_t strips_stride;
  int64_t rows_stride;
  int64_t lora_stride;
  double* step_seconds;  // [Step::count] thread seconds, added to by a timed instance
  Checks* checks;        // of a checked instance
  double* census;        // see traced.hpp; added to by a traced instance, which runs on one thread
  ObserveValues observe;
};

}  // namespace jitmoe
