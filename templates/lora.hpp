// LoRA rides in the base products: u = s v A^T is a panel of `rank` more columns, B^T more rows of weights.
//
//     strip = [ v | u ] . [ W | B ]^T            forward; in backward [ g | s g B ] . [ W ; A ]
//
// The parameters are read where they lie in every call and never packed, so an optimizer step can't be
// missed. Gradients are outer products of low-rank rows with the strips already at hand.
#pragma once
#include <cstring>

#include "call.hpp"
#include "gemm/interface.hpp"

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

// Rows `first`... of a B matrix [out, r] as a strip [r, 32], zeros beyond `count`.
template <Shape S, class Gemm>
void load_rows(const LoraMatrix<S>& b, int64_t rank, int64_t first, int64_t count, float* strip) {
  const auto* from = b.data + first * b.columns;
  if constexpr (!S.lora_bf16) {
    Gemm::transpose_padded(from, b.columns, count, rank, strip, kStrip);
  } else {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t c = 0; c < kStrip; ++c)
        strip[r * kStrip + c] = c < count ? load_lora(from + c * b.columns + r) : 0.0f;
  }
}

// Columns `first`... of an A matrix [r, in] as a strip [r, 32] in the order of backward, zeros beyond `count`.
template <Shape S, class Gemm>
void load_columns(const LoraMatrix<S>& a, int64_t rank, int64_t first, int64_t count, float* strip) {
  for (int64_t r = 0; r < rank; ++r, strip += kStrip) {
    const auto* from = a.data + r * a.columns + first;
    if (count == kStrip) {  // bounds that are constant become vectors
      for (int64_t i = 0; i < kStrip; ++i) strip[i] = load_lora(from + Gemm::column_at(i));
    } else {
      for (int64_t i = 0; i < kStrip; ++i)
        strip[i] = Gemm::column_at(i) < count ? load_lora(from + Gemm::column_at(i)) : 0.0f;
    }
  }
}

// Where a gradient goes: `columns` of its axis of length `width` from `column` on. `first` says that these are the
// first rows of its expert, so that what lies there is not read: it may be anything.
struct GradStrip {
  float* grad;
  int64_t column;
  int64_t columns;
  int64_t width;
  bool first;
};

inline void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; ++c) to[row * to_stride + c] = from[row * from_stride + c];
}

// The gradient [rank, width] of an A matrix: += low_rows^T . strip
template <class Gemm>
void add_a_grad(const float* low_rows, int64_t rows, int64_t rank, const float* strip, const GradStrip& to,
                float* scratch) {
  float* place = to.grad + to.column;
  std::memset(scratch, 0, rank * kStrip * sizeof(float));
  if (!to.first) copy_rows(place, to.width, rank, to.columns, scratch, kStrip);
  Gemm::outer(low_rows, rank, rank, strip, rows, scratch);
  if (to.columns == kStrip)
    copy_rows(scratch, kStrip, rank, kStrip, place, to.width);
  else
    copy_rows(scratch, kStrip, rank, to.columns, place, to.width);
}

// The gradient [width, rank] of a B matrix: += strip^T . low_rows
template <class Gemm>
void add_b_grad(const float* low_rows, int64_t rows, int64_t rank, const float* strip, const GradStrip& to,
                float* scratch) {
  float* place = to.grad + to.column * rank;
  if (to.first)
    std::memset(scratch, 0, rank * kStrip * sizeof(float));
  else
    Gemm::transpose_padded(place, rank, to.columns, rank, scratch, kStrip);
  Gemm::outer(low_rows, rank, rank, strip, rows, scratch);
  Gemm::transpose(scratch, kStrip, rank, to.columns, place, rank);
}

}  // namespace jitmoe
