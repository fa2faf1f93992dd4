// The C ABI: one struct of 8-byte fields for forward and backward. jitmoe/jit/abi.py mirrors it field by field, and a
// test holds the two against each other by name.
#pragma once
#include <cstdint>

#include "bf16.hpp"

namespace jitmoe {

inline constexpr int kAbiVersion = 4;

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

// A matrix of each expert where its owner keeps it: element (e, i, j) is e * expert + i * row + j * column behind data.
template <class T>
struct Matrices {
  T* data;
  int64_t expert;
  int64_t row;
  int64_t column;
};

// A buffer with a part for each thread, `stride` bytes from one part to the next.
template <class T>
struct PerThread {
  T* data;
  int64_t stride;
};

// gate, up or down: v W^T + u B^T with u = s v A^T. `in` and `out` are H and I for gate and up, I and H for down.
struct Projection {
  // Of the caller.
  const void* weights;     // [E, out, in], packed as in weights/layout.hpp
  const float* bias;       // [E, out]
  Matrices<const void> a;  // [E, r, in]
  Matrices<const void> b;  // [E, out, r]
  Matrices<float> a_grad;  // of experts with rows all written, others not; all six null where none is wanted
  Matrices<float> b_grad;
  bf16* saved;  // gate and up: [strips of I, S, 32] before the activation; forward writes it where not null
  float* saved_u;  // [S, r]; null where gate.saved is
  // Scratch; plan/scratch.py has sizes and lifetimes. On tiles `low` and the rows have the form of gemm/lora_tiles.hpp.
  float* low;        // [blocks, r, m_step]: u in forward, du in backward, right operands of the LoRA K-step
  float* du_rows;    // [rows, r] du for the gradient of A; of down times the routing weight
  float* u_rows;     // [rows, r] u for the gradient of B, where forward saved none in this form
  void* grad_panel;  // gate and up: [rows, I] of the gradient before the activation
  bf16* again;       // gate and up: as `saved` for the rows of a group, where they are computed again
};

struct Call {
  // Tensors of the caller; T tokens, S rows (kept slots), H hidden, I intermediate, r rank, E experts.
  const bf16* x;         // [T, H]
  const bf16* out_grad;  // [T, H], backward
  Projection gate;
  Projection up;
  Projection down;
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
  double alpha;  // of the activation
  double limit;
  GatherRows gather_rows;
  SumRows sum_rows;
  // Scratch beside that of the projections. Panels are row block after row block.
  float* sums;                      // [strips of H, T, 32] token sums: a strip belongs to one thread
  void* x_panel;                    // [rows, H] of x; in backward only where gate and up are computed again
  void* out_panel;                  // [rows, H] of the gradient of out
  void* act_panel;                  // [rows, I] of a = silu(gate) * up
  float* dot_parts;                 // [rows, strips of I] parts of the gradient of the routing weights
  PerThread<float> thread_weights;  // expanded weights
  PerThread<float> thread_strips;   // strips of float32 columns
  PerThread<bf16> thread_rows;      // gathered rows
  PerThread<float> thread_lora;     // [r, 32] of a LoRA matrix
  // Of those who watch.
  double* phase_seconds;  // [Phase::count] thread seconds, added to by a timed instance
  Checks* checks;         // of a checked instance
  double* census;         // see watch/traced.hpp; added to by a traced instance, which runs on one thread
  ObserveValues observe;
};

}  // namespace jitmoe
