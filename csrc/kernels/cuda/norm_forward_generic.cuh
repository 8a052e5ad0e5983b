// SPDX-License-Identifier: BSD-3-Clause
// norm_forward.cuh's functions for any types, strides, alignment and number of columns: a block a row, element by
// element, and the row is read three times (twice where the norm is not centered), after the first from cache where it
// fits.
#pragma once

#include "dropout.cuh"
#include "element.cuh"
#include "row_sum.cuh"

namespace resnorm::cuda {

// Accumulates in Value. The seed of `a.dropout` is at `seed_address`.
template <class Value>
RESNORM_KERNEL(kGenericThreads, 1)
norm_forward_generic(const NormForward a, const std::int64_t* seed_address) {
  const RowGroup<0, false> group{thread_index(), block_threads(), 1};
  Value* slot = reinterpret_cast<Value*>(shared_memory());
  const int slot_size = RowGroup<0, false>::slot_size(block_threads(), 1, 2);
  const auto seed = a.dropout.threshold > 0 ? static_cast<std::uint64_t>(*seed_address) : 0;
  const auto count = static_cast<Value>(a.cols);
  int turn = 0;
  const auto sum_over_row = [&](Value(&values)[2]) {
    group.sum(values, SumSlot<Value>{slot + turn * slot_size});
    turn ^= 1;
  };

  for (std::int64_t row = block_index(); row < a.rows; row += grid_blocks()) {
    const auto sum_at = [&](std::int64_t column) {
      auto value = load_element<Value>(a.input.data, a.input.dtype, row * a.input.row_stride + column);
      if (a.input_bias.data != nullptr) {
        value += load_element<Value>(a.input_bias.data, a.input_bias.dtype, column);
      }
      if (a.dropout.threshold > 0) {
        value = dropped(value, row * a.cols + column, seed, a.dropout);
      }
      if (a.residual.data == nullptr) return value;
      return value + load_element<Value>(a.residual.data, a.residual.dtype, row * a.residual.row_stride + column);
    };
    Value rounded_mean = 0;
    if (a.centered) {
      Value total[2] = {};  // two, so that consecutive sums take slots of one size in turns
      for (std::int64_t column = thread_index(); column < a.cols; column += block_threads()) total[0] += sum_at(column);
      sum_over_row(total);
      rounded_mean = total[0] / count;
    }
    Value moments[2] = {};
    for (std::int64_t column = thread_index(); column < a.cols; column += block_threads()) {
      const Value deviation = sum_at(column) - rounded_mean;
      moments[0] += deviation;
      moments[1] += deviation * deviation;
    }
    sum_over_row(moments);
    const Value delta = a.centered ? moments[0] / count : Value(0), variance = moments[1] / count - delta * delta;
    const Value rstd = reciprocal_sqrt((variance < Value(0) ? Value(0) : variance) + static_cast<Value>(a.eps));
    if (thread_index() == 0 && a.mean != nullptr) static_cast<Value*>(a.mean)[row] = rounded_mean + delta;
    if (thread_index() == 0 && a.rstd != nullptr) static_cast<Value*>(a.rstd)[row] = rstd;
    for (std::int64_t column = thread_index(); column < a.cols; column += block_threads()) {
      const Value sum = sum_at(column);  // before anything is written, because results may be written over inputs
      Value value = (sum - rounded_mean - delta) * rstd;
      if (a.weight.data != nullptr) value *= load_element<Value>(a.weight.data, a.weight.dtype, column);
      if (a.bias.data != nullptr) value += load_element<Value>(a.bias.data, a.bias.dtype, column);
      if (a.sum.data != nullptr) store_element(a.sum.data, a.sum.dtype, row * a.sum.row_stride + column, sum);
      store_element(a.output.data, a.output.dtype, row * a.output.row_stride + column, value);
    }
  }
}

}  // namespace resnorm::cuda
