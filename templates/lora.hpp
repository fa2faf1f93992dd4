// LoRA rides in the base products: u = s v A^T is a panel of `rank` more columns, B^T more rows of weights.
//
//     strip = [ v | u ] . [ W | B ]^T            forward; in backward [ g | s g B ] . [ W ; A ]
//
// The parameters are read where they lie in every call and never packed, so an optimizer step can't be
// missed. Gradients are outer products of low-rank rows with the strips already at hand.
#pragma once
#include "call.hpp"
#include "gemm.hpp"

namespace jitmoe {

// One of the six parameters of one expert, [rows, columns] row-major.
template <Shape S>
struct LoraMatrix {
  using View = LoraView<S.lora_bf16>;
  using Element = typename View::Element;
  const Element* data;
  int64_t columns;
  LoraMatrix(const void* parameter, int64_t expert, int64_t rows, int64_t columns)
      : data(static_cast<const Element*>(parameter) + expert * rows * columns), columns(columns) {}
  View along_rows() const { return {data, columns, 1}; }     // contraction over the rows: B [out, r]
  View along_columns() const { return {data, 1, columns}; }  // contraction over the columns: A [r, in]
};

// low = scale * block . lora, kept as [rank, m_step] for the K-step that follows and, where `as_rows` is
// given, as rows [count, rank] (times row_weight) for the gradients.
template <Shape S, class Gemm>
void low_rank_block(const typename Gemm::Operand* block, int64_t count, int64_t k,
                    typename LoraMatrix<S>::View lora, int64_t rank, float scale, float* low, float* as_rows,
                    const float* row_weight) {
  Gemm::low_rank(block, count, k, lora, rank, low);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t row = 0; row < count; ++row) {
      const float value = low[r * S.m_step + row] * scale;
      low[r * S.m_step + row] = value;
      if (as_rows) as_rows[row * rank + r] = row_weight ? value * row_weight[row] : value;
    }
}

inline int64_t natural(int64_t column) { return column; }

// [rank, 32] float32 from at(column, rank), zeros beyond `columns`; column c goes to place lane(c).
template <class At, class Lane>
void load_strip(int64_t rank, int64_t columns, float* strip, At&& at, Lane&& lane) {
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t c = 0; c < kStrip; ++c) strip[r * kStrip + lane(c)] = c < columns ? at(c, r) : 0.0f;
}

// grad [rank, width] of an A matrix, columns `column`...: += low_rows^T . strip
template <class Gemm>
void add_a_grad(const float* low_rows, int64_t rows, int64_t rank, const float* strip, int64_t column,
                int64_t columns, int64_t width, float* grad, float* scratch) {
  load_strip(
      rank, columns, scratch, [&](int64_t c, int64_t r) { return grad[r * width + column + c]; }, natural);
  Gemm::outer(low_rows, rank, rank, strip, rows, scratch);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t c = 0; c < columns; ++c) grad[r * width + column + c] = scratch[r * kStrip + c];
}

// grad [width, rank] of a B matrix, rows `column`...: += strip^T . low_rows
template <class Gemm>
void add_b_grad(const float* low_rows, int64_t rows, int64_t rank, const float* strip, int64_t column,
                int64_t columns, float* grad, float* scratch) {
  load_strip(
      rank, columns, scratch, [&](int64_t c, int64_t r) { return grad[(column + c) * rank + r]; }, natural);
  Gemm::outer(low_rows, rank, rank, strip, rows, scratch);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t c = 0; c < columns; ++c) grad[(column + c) * rank + r] = scratch[r * kStrip + c];
}

}  // namespace jitmoe
