// SPDX-License-Identifier: BSD-3-Clause
// residual_add_forward.cuh's and residual_add_backward.cuh's functions for any types, strides and alignment, element by
// element: a thread has one column of a tile, in every so many rows.
#pragma once

#include "dropout.cuh"
#include "element.cuh"

namespace resnorm::cuda {

// Where a thread of the grid, [row_subsets][tiles] blocks, finds its elements.
struct ColumnOfSubset {
  std::int64_t tiles, row_subsets;

  RESNORM_DEVICE std::int64_t subset() const { return block_index() / tiles; }
  RESNORM_DEVICE std::int64_t column() const { return block_index() % tiles * block_threads() + thread_index(); }
};

template <class Value>
RESNORM_KERNEL(kGenericThreads, 1)
residual_add_forward_generic(const ResidualAddForward a, const std::int64_t* seed_address, const ColumnOfSubset place) {
  const std::int64_t column = place.column();
  if (column >= a.cols) return;
  const auto seed = a.dropout.threshold > 0 ? static_cast<std::uint64_t>(*seed_address) : 0;
  for (std::int64_t row = place.subset(); row < a.rows; row += place.row_subsets) {
    auto value = load_element<Value>(a.input.data, a.input.dtype, row * a.input.row_stride + column);
    if (a.input_bias.data != nullptr) value += load_element<Value>(a.input_bias.data, a.input_bias.dtype, column);
    if (a.dropout.threshold > 0) value = dropped(value, row * a.cols + column, seed, a.dropout);
    value += load_element<Value>(a.residual.data, a.residual.dtype, row * a.residual.row_stride + column);
    store_element(a.output.data, a.output.dtype, row * a.output.row_stride + column, value);
  }
}

// `a.workspace`, where grad_input_bias is wanted, holds [row_subsets][cols] of Value.
template <class Value>
RESNORM_KERNEL(kGenericThreads, 1)
residual_add_backward_generic(const ResidualAddBackward a, const std::int64_t* seed_address,
                              const ColumnOfSubset place) {
  const std::int64_t column = place.column();
  if (column >= a.cols) return;
  const auto seed = a.dropout.threshold > 0 ? static_cast<std::uint64_t>(*seed_address) : 0;
  Value total = 0;
  for (std::int64_t row = place.subset(); row < a.rows; row += place.row_subsets) {
    auto value = load_element<Value>(a.grad_output.data, a.grad_output.dtype, row * a.grad_output.row_stride + column);
    if (a.dropout.threshold > 0) value = dropped(value, row * a.cols + column, seed, a.dropout);
    if (a.grad_input.data != nullptr) {
      store_element(a.grad_input.data, a.grad_input.dtype, row * a.grad_input.row_stride + column, value);
    }
    total += value;
  }
  if (a.grad_input_bias.data != nullptr) static_cast<Value*>(a.workspace)[place.subset() * a.cols + column] = total;
}

}  // namespace resnorm::cuda
