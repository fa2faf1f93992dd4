// What a traced instance shows of a call: each named tensor, piece by piece where it is computed. Every use stands
// behind `if constexpr`: a function that is merely empty in other instances is still weighed when GCC decides what
// to inline, and changed their code (compared 2026-11-23).
//
//   census [experts, Tensor::count, kCensus]     one record of doubles for each expert and tensor; what its
//                                                  fields are is the business of the callback, see scan.py
//
// A traced call runs on one thread, so records are added to without locks and in a fixed order.
#pragma once
#include "parallel.hpp"

namespace jitmoe {

inline constexpr int64_t kCensus = 9;

// abi.py has the names in the same order. `du` is the gradient of u, dv of v.
enum class Tensor {
  x,
  gate_u,
  up_u,
  gate,
  up,
  act,
  down_u,
  down,
  dout,
  down_du,
  dact,
  dgate,
  dup,
  gate_du,
  up_du,
  dx,
  count
};

// Where a piece of a tensor lies in it, in rows sorted by expert, and in memory.
struct Piece {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

inline void observe(const Call& call, Tensor what, int64_t expert, const Piece& piece, const float* values) {
  constexpr int64_t tensors = static_cast<int64_t>(Tensor::count);
  call.observe(call.census + (expert * tensors + static_cast<int64_t>(what)) * kCensus, values, piece.row,
               piece.rows, piece.column, piece.columns, piece.row_stride, piece.column_stride);
}

// One strip of results: 32 columns of all rows of a segment, less what lies beyond `width`.
inline void observe_strip(const Call& call, Tensor what, const Segment& segment, int64_t strip, int64_t width,
                          const float* values) {
  const int64_t column = strip * kStrip;
  observe(call, what, segment.expert,
          {segment.row, segment.rows, column, smaller(kStrip, width - column), kStrip, 1}, values);
}

// The low-rank product of a row block, [rank, m_step].
template <Shape S>
void observe_low(const Call& call, Tensor what, const Block& block, const float* low) {
  observe(call, what, block.segment->expert, {block.row, block.rows, 0, call.rank, 1, S.m_step}, low);
}

// Gathered rows of tokens.
template <Shape S>
void observe_rows(const Call& call, Tensor what, const Block& block, const bf16* rows, int64_t stride) {
  for (int64_t row = 0; row < block.rows; ++row)
    for (int64_t column = 0; column < S.hidden; column += kStrip) {
      float values[kStrip];
      const int64_t columns = smaller(kStrip, S.hidden - column);
      for (int64_t c = 0; c < columns; ++c) values[c] = to_float(rows[row * stride + column + c]);
      observe(call, what, block.segment->expert, {block.row + row, 1, column, columns, kStrip, 1}, values);
    }
}

// What the gradients of LoRA read of forward without computing it again; `rows` has room for the rows of a block.
template <Shape S>
void observe_saved(const Call& call, const Block& block, bf16* rows) {
  constexpr int64_t stride = round_up(S.hidden, kKStep);
  call.gather_rows(call.x, S.hidden, call.row_token + block.row, block.rows, 0, S.hidden, rows, stride);
  observe_rows<S>(call, Tensor::x, block, rows, stride);
  const Piece piece{block.row, block.rows, 0, call.rank, call.rank, 1};
  const int64_t expert = block.segment->expert;
  observe(call, Tensor::gate_u, expert, piece, call.gate.saved_u + block.row * call.rank);
  observe(call, Tensor::up_u, expert, piece, call.up.saved_u + block.row * call.rank);
  observe(call, Tensor::down_u, expert, piece, call.down.saved_u + block.row * call.rank);
}

}  // namespace jitmoe
