// SPDX-License-Identifier: BSD-3-Clause
// norm_backward.cuh's functions for any types, strides, alignment and number of columns: a block takes every so many
// rows, element by element, and keeps its columns' sums in its row of the partials.
#pragma once

#include "dropout.cuh"
#include "element.cuh"
#include "plan.h"
#include "row_sum.cuh"

namespace resnorm::cuda {

// Accumulates in Value. `a.workspace` holds [blocks][backward_column_sums][cols] of Value.
template <class Value>
RESNORM_KERNEL(kGenericThreads, 1)
norm_backward_generic(const NormBackward a, const std::int64_t* seed_address) {
  const RowGroup<0, false> group{thread_index(), block_threads(), 1};
  Value* slot = reinterpret_cast<Value*>(shared_memory());
  constexpr int kRowSums = backward_row_sums(true);  // where a norm is not centered, two of them stay 0
  const int slot_size = RowGroup<0, false>::slot_size(block_threads(), 1, kRowSums);
  const auto seed = a.dropout.threshold > 0 ? static_cast<std::uint64_t>(*seed_address) : 0;
  const auto count = static_cast<Value>(a.cols);
  const bool has_input_bias = a.grad_input_bias.data != nullptr;
  const int sums = backward_column_sums(a.centered, has_input_bias);
  Value* const partials = static_cast<Value*>(a.workspace) + static_cast<std::int64_t>(block_index()) * sums * a.cols;
  for (std::int64_t i = thread_index(); i < sums * a.cols; i += block_threads()) partials[i] = Value(0);
  barrier(0, block_threads());

  int turn = 0;
  for (std::int64_t row = block_index(); row < a.rows; row += grid_blocks()) {
    const Value mean = a.centered ? static_cast<const Value*>(a.mean)[row] : Value(0);
    const auto deviation_at = [&](std::int64_t column) {
      return load_element<Value>(a.sum.data, a.sum.dtype, row * a.sum.row_stride + column) - mean;
    };
    const auto gradient_at = [&](std::int64_t column) {
      return load_element<Value>(a.grad_output.data, a.grad_output.dtype, row * a.grad_output.row_stride + column);
    };
    const auto weighted_at = [&](std::int64_t column) {
      const Value gradient = gradient_at(column);
      return a.weight.data == nullptr ? gradient
                                      : gradient * load_element<Value>(a.weight.data, a.weight.dtype, column);
    };
    const Value rstd = static_cast<const Value*>(a.rstd)[row];
    Value totals[kRowSums] = {};  // of g * (x - mean), g, x - mean
    for (std::int64_t column = thread_index(); column < a.cols; column += block_threads()) {
      const Value weighted = weighted_at(column), deviation = deviation_at(column);
      totals[0] += weighted * deviation;
      if (!a.centered) continue;
      totals[1] += weighted;
      totals[2] += deviation;
    }
    group.sum(totals, SumSlot<Value>{slot + turn * slot_size});
    turn ^= 1;
    const Value delta = totals[2] / count, mean_g = totals[1] / count;
    const Value mean_gn = (totals[0] - delta * totals[1]) * rstd / count;
    for (std::int64_t column = thread_index(); column < a.cols; column += block_threads()) {
      const Value normalized = (deviation_at(column) - delta) * rstd;
      Value result = (weighted_at(column) - mean_g - normalized * mean_gn) * rstd;
      partials[column] += gradient_at(column) * normalized;
      if (a.centered) partials[a.cols + column] += gradient_at(column);
      if (a.grad_sum.data != nullptr) {
        result += load_element<Value>(a.grad_sum.data, a.grad_sum.dtype, row * a.grad_sum.row_stride + column);
      }
      if (a.grad_residual.data != nullptr) {
        store_element(a.grad_residual.data, a.grad_residual.dtype, row * a.grad_residual.row_stride + column, result);
      }
      if (a.dropout.threshold > 0) {
        result = dropped(result, row * a.cols + column, seed, a.dropout);
      }
      if (a.grad_input.data != nullptr) {
        store_element(a.grad_input.data, a.grad_input.dtype, row * a.grad_input.row_stride + column, result);
      }
      if (has_input_bias) partials[(sums - 1) * a.cols + column] += result;
    }
  }
}

}  // namespace resnorm::cuda
