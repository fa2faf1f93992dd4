// A traced instance shows each named tensor of a call, piece by piece where it is computed. Every use is under
// `if constexpr`: an empty function in the other instances would still count when GCC decides what to inline, and did
// change their code (compared 2026-11-23).
//
//   census [experts, Tensor::count, kCensus]     a record of doubles for each expert and tensor, whose fields only
//                                                  the callback knows: RECORD in jitmoe/host/scan.py
//
// A traced call runs on one thread, so records grow without locks and in a fixed order.
#pragma once
#include "parallel.hpp"

namespace jitmoe {

inline constexpr int64_t kCensus = 9;

// TENSORS in jitmoe/jit/abi.py has the names in the same order. `du` is the gradient of u.
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

// Place of a piece in its tensor, whose rows are sorted by expert, and in memory.
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

// One strip of results: 32 columns of all rows of a segment, without those beyond `width`.
inline void observe_strip(const Call& call, Tensor what, const Segment& segment, int64_t strip, int64_t width,
                          const float* values) {
  const int64_t column = strip * kStrip;
  observe(call, what, segment.expert,
          {segment.row, segment.rows, column, smaller(kStrip, width - column), kStrip, 1}, values);
}

// The low-rank product of a row block, whose values are at(row, r).
template <Shape S, class At>
void observe_low(const Call& call, Tensor what, const Block& block, At&& at) {
  for (int64_t r = 0; r < call.rank; ++r) {
    float values[S.m_step];
    for (int64_t row = 0; row < block.rows; ++row) values[row] = at(row, r);
    observe(call, what, block.segment->expert, {block.row, block.rows, r, 1, 1, 1}, values);
  }
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

// x and u, which the gradients of LoRA read as forward saved them; `rows` has room for the rows of a block.
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
