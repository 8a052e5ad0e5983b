// SPDX-License-Identifier: BSD-3-Clause
// output = dropout(activation(input + bias)), and its backward pass: grad_input = dropout'(grad_output) *
// activation'(input + bias).
#pragma once

#include <cstdint>

#include "activation.h"
#include "column_sums.h"
#include "dropout.h"
#include "loops.h"
#include "parallel.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Dropout of one row: where nothing is dropped a loop without it is compiled.
template <bool kDrops>
struct RowDropout {
  const std::uint16_t* draws = nullptr;
  std::uint32_t threshold = 0;
  float scale = 1;

  RESNORM_INLINE Vec<float> operator()(Vec<float> values, std::int64_t i) const {
    if constexpr (!kDrops) return values;
    return values.keep(draws + i, threshold) * Vec<float>::broadcast(scale);
  }
};

template <bool kDrops>
RESNORM_INLINE RowDropout<kDrops> dropout_of_row(const DropoutRows& rows, std::int64_t row, int slot = 0) {
  if constexpr (!kDrops) return {};
  return {rows.row(row, slot), rows.threshold, rows.scale};
}

template <class Activate, class T, bool kDrops>
void bias_activation_rows(const BiasActivationForward& a, std::int64_t begin, std::int64_t end) {
  using V = Vec<float>;
  RowBuffers buffers;
  const RowReader<T> input(a.input, a.cols, buffers);
  const RowWriter<T> output(a.output, a.cols, buffers);
  const float* bias = vector_or(a.bias, 0.0F, a.cols, buffers);
  const DropoutRows dropout_rows(a.dropout, kDrops ? a.cols : 0, buffers);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* from = input.row(row);
    T* to = output.row(row);
    const auto dropout = dropout_of_row<kDrops>(dropout_rows, row);
    for_each_vector<float, 4>(a.cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
      const V value = Activate::template value<float>(V::load(from + i, lanes) + V::load(bias + i, lanes));
      dropout(value, i).store(to + i, lanes);
    });
    output.commit(row);
  }
}

template <class T, bool kDrops>
struct BiasActivationBackwardRow {
  const T *grad_output, *input;
  T *grad_input, *output;
  RowDropout<kDrops> dropout;
};

template <class Activate, class T, bool kDrops>
RESNORM_INLINE void bias_activation_backward_group(const BiasActivationBackwardRow<T, kDrops> (&rows)[kRowsPerGroup],
                                                   bool wants_output, std::int64_t cols, const float* bias,
                                                   float* sums) {
  using V = Vec<float>;
  for_each_vector<float, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    const V b = V::load(bias + i, lanes);
    V sum = {};
    unrolled<kRowsPerGroup>([&](auto k) RESNORM_INLINE_LAMBDA {
      const auto& row = rows[k];
      const auto activated = Activate::with_derivative(V::load(row.input + i, lanes) + b);
      const V grad = row.dropout(V::load(row.grad_output + i, lanes), i) * activated.derivative;
      grad.store(row.grad_input + i, lanes);
      if (wants_output) row.dropout(activated.value, i).store(row.output + i, lanes);
      sum = k == 0 ? grad : sum + grad;
    });
    (V::load(sums + i, lanes) + sum).store(sums + i, lanes);
  });
}

template <class Activate, class T, bool kDrops>
void bias_activation_backward_as(const BiasActivationBackward& a, ParallelFor parallel_for) {
  const ColumnSums<float, 1> column_sums(&a.grad_bias, a.rows, a.cols, a.workspace);
  parallel(parallel_for, column_sums.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const RowReader<T> grad_output(a.grad_output, a.cols, buffers, kRowsPerGroup);
    const RowReader<T> input(a.input, a.cols, buffers, kRowsPerGroup), zeros({}, a.cols, buffers);
    const RowWriter<T> grad_input(a.grad_input, a.cols, buffers, kRowsPerGroup), discard({}, a.cols, buffers);
    const RowWriter<T> output(a.output, a.cols, buffers, kRowsPerGroup);
    const float* bias = vector_or(a.bias, 0.0F, a.cols, buffers);
    const DropoutRows dropout(a.dropout, kDrops ? a.cols : 0, buffers, kRowsPerGroup);
    float* const scratch[] = {buffers.take<float>(a.cols)};
    const auto batch = [&](std::int64_t first, std::int64_t last, float* const(&sums)[1]) {
      for (std::int64_t row = first; row < last; row += kRowsPerGroup) {
        BiasActivationBackwardRow<T, kDrops> rows[kRowsPerGroup];
        for (int k = 0; k < kRowsPerGroup; ++k) {
          if (row + k < last) {
            rows[k] = {grad_output.row(row + k, k), input.row(row + k, k), grad_input.row(row + k, k),
                       output.row(row + k, k), dropout_of_row<kDrops>(dropout, row + k, k)};
          } else {  // adds zero to the sum, or NaN where the bias makes every row's derivative NaN
            rows[k] = {zeros.row(0), zeros.row(0), discard.row(0), discard.row(0), rows[0].dropout};
          }
        }
        bias_activation_backward_group<Activate>(rows, a.output.data != nullptr, a.cols, bias, sums[0]);
        for (int k = 0; k < kRowsPerGroup && row + k < last; ++k) {
          grad_input.commit(row + k, k);
          output.commit(row + k, k);
        }
      }
    };
    for (std::int64_t block = begin; block < end; ++block) column_sums.accumulate(block, a.rows, scratch, batch);
  });
  column_sums.finish(parallel_for);
}

inline void bias_activation_forward(const BiasActivationForward& a, ParallelFor parallel_for) {
  visit(a.activation, [&](auto tag) {
    with_flag(a.dropout.threshold != 0, [&](auto drops) {
      using Activate = typename decltype(tag)::Type;
      void (*range)(const BiasActivationForward&, std::int64_t begin, std::int64_t end) = nullptr;
      if constexpr (kHasLoops<float>) range = bias_activation_rows<Activate, float, drops != 0>;
      for_each_half([&](auto half) {
        using Half = typename decltype(half)::Type;
        if (all_are<Half>(a.input, a.output)) range = bias_activation_rows<Activate, Half, drops != 0>;
      });
      if (range == nullptr) return base::activation_kernels.bias_activation_forward(a, parallel_for);
      parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
    });
  });
}

inline void bias_activation_backward(const BiasActivationBackward& a, ParallelFor parallel_for) {
  visit(a.activation, [&](auto tag) {
    with_flag(a.dropout.threshold != 0, [&](auto drops) {
      using Activate = typename decltype(tag)::Type;
      void (*run)(const BiasActivationBackward&, ParallelFor) = base::activation_kernels.bias_activation_backward;
      if constexpr (kHasLoops<float>) run = bias_activation_backward_as<Activate, float, drops != 0>;
      for_each_half([&](auto half) {
        using Half = typename decltype(half)::Type;
        if (all_are<Half>(a.grad_output, a.input, a.grad_input)) {
          run = bias_activation_backward_as<Activate, Half, drops != 0>;
        }
      });
      run(a, parallel_for);
    });
  });
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
