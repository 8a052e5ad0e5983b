// SPDX-License-Identifier: BSD-3-Clause
// grad_input = dropout'(grad_output), and grad_input_bias = its sums over the rows, as float32 partial sums, one row of
// them a subset. Each element is read once and written once.
//
// A subset has every so many rows. Where columns are summed, a thread owns the same columns of all rows of its subset:
// where rows do not start at multiples of a vector, those of a subset are kVector rows apart, as in norm_backward.cuh.
#pragma once

#include "column_sums.cuh"
#include "dropout.cuh"
#include "row_access.cuh"

namespace resnorm::cuda {

// Strides in elements. What is absent is null.
struct ResidualAddBackwardArguments {
  const void* grad_output;
  void* grad_input;
  float* partials;  // [row_subsets][cols]
  const std::int64_t* seed;
  std::int64_t rows, cols, tiles, row_subsets, grad_output_stride, grad_input_stride;
  int row_threads;
  int first_element;
  std::uint32_t threshold;
  float scale;
};

// From a Gradient to a Result, grad_input's type. kInputBias: the columns are summed.
template <class Gradient, class Result, int kVector, bool kShifted, bool kDrops, bool kInputBias>
RESNORM_KERNEL(kInputBias ? kColumnSumThreads : kElementwiseThreads, kInputBias ? 1 : 4)
residual_add_backward(const ResidualAddBackwardArguments a) {
  constexpr int kItems = kInputBias ? kColumnSumItems : kElementwiseItems;
  constexpr int kApart = kShifted && kInputBias ? kVector : 1;
  const std::int64_t groups = block_threads() / a.row_threads;
  const std::int64_t subset = block_index() / a.tiles, tile = block_index() % a.tiles;
  const int step = a.row_threads * kVector;
  const auto seed = kDrops ? static_cast<std::uint64_t>(*a.seed) : 0;
  const auto first_column_of = [&](std::int64_t row) {
    return tile * kItems * step - (kShifted ? (a.first_element + row * a.grad_output_stride) % kVector : 0);
  };
  const std::int64_t subset_row = subset / kApart * kApart * groups + subset % kApart;

  float sums[kItems][kVector] = {};
  for (std::int64_t row = subset_row + thread_index() / a.row_threads * kApart; row < a.rows;
       row += a.row_subsets * groups) {
    const std::int64_t base = first_column_of(row) + thread_index() % a.row_threads * kVector;
    const auto* gradient = static_cast<const Gradient*>(a.grad_output) + row * a.grad_output_stride + base;
    Words<kVector * sizeof(Gradient)> words[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      words[i] = load_vector<Gradient, kVector, kShifted>(gradient + i * step, base + i * step, a.cols);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t column = base + i * step;
      if (column >= a.cols) continue;
      float result[kVector];
      ElementWords<Gradient>::template unpack<kVector>(words[i], result);
      if constexpr (kDrops) apply_dropout<!kShifted>(result, row * a.cols + column, seed, a.threshold, a.scale);
      if (a.grad_input != nullptr) {
        auto* to = static_cast<Result*>(a.grad_input) + row * a.grad_input_stride + column;
        store_vector<Result, kVector, kShifted>(to, column, a.cols, result);
      }
      if constexpr (kInputBias) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) sums[i][k] += result[k];
      }
    }
  }
  if constexpr (kInputBias) {
    begin_next_kernel();
    auto* const exchange = reinterpret_cast<float*>(shared_memory());
    store_column_sums<kVector, kItems>(sums, exchange, a.row_threads, first_column_of(subset_row), a.cols,
                                       a.partials + subset * a.cols);
  }
}

}  // namespace resnorm::cuda
