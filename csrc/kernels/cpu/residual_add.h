// SPDX-License-Identifier: BSD-3-Clause
// output = residual + dropout(input + input_bias), and its backward pass: grad_input = dropout'(grad_output).
#pragma once

#include <cstdint>

#include "column_sums.h"
#include "dropout.h"
#include "parallel.h"
#include "residual_sum.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class Input, class Stream>
void residual_add_rows(const ResidualAddForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<Input, Stream>;
  with_branch_flags(a, [&](auto has_bias, auto has_dropout) {
    RowBuffers buffers;
    const ResidualSumRows<Input, Stream, Acc, has_bias.value, has_dropout.value> sums(a, buffers);
    const RowWriter<Stream> output(a.output, a.cols, buffers);
    for (std::int64_t row = begin; row < end; ++row) {
      const auto sum = sums.row(row);
      Stream* to = output.row(row);
      for_each_vector<Acc, 4>(a.cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
        sum(i, lanes).store(to + i, lanes);
      });
      output.commit(row);
    }
  });
}

inline void residual_add_forward(const ResidualAddForward& a, ParallelFor parallel_for) {
  const auto stream = [&](auto tag) { return all_are<typename decltype(tag)::Type>(a.residual, a.output); };
  auto* range = any_float64(a.input, a.residual, a.output) ? residual_add_rows<double, double>
                                                           : residual_add_rows<float, float>;
  if (all_are<BFloat16>(a.input) && stream(Tag<BFloat16>{})) range = residual_add_rows<BFloat16, BFloat16>;
  if (all_are<BFloat16>(a.input) && stream(Tag<float>{})) range = residual_add_rows<BFloat16, float>;
  if (all_are<Float16>(a.input) && stream(Tag<Float16>{})) range = residual_add_rows<Float16, Float16>;
  if (all_are<Float16>(a.input) && stream(Tag<float>{})) range = residual_add_rows<Float16, float>;
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

template <class Stream, class Input, int kRows, class Acc>
RESNORM_INLINE void residual_add_backward_group(const Stream* const (&grad_output)[kRows],
                                                const std::uint16_t* const (&draws)[kRows], std::uint32_t threshold,
                                                Acc scale, std::int64_t cols, Input* const (&grad_input)[kRows],
                                                Acc* sums) {
  using V = Vec<Acc>;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    V sum = {};
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V grad = (V::load(grad_output[k] + i, lanes) * V::broadcast(scale)).keep(draws[k] + i, threshold);
      grad.store(grad_input[k] + i, lanes);
      sum = k == 0 ? grad : sum + grad;
    });
    (V::load(sums + i, lanes) + sum).store(sums + i, lanes);
  });
}

template <class Stream, class Input>
void residual_add_backward_as(const ResidualAddBackward& a, ParallelFor parallel_for) {
  using Acc = Accumulation<Stream, Input>;
  const ColumnSums<Acc, 1> column_sums({a.grad_input_bias}, a.rows, a.cols, a.workspace);
  parallel(parallel_for, column_sums.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const RowReader<Stream> grad_output(a.grad_output, a.cols, buffers, kRowsPerGroup);
    const RowWriter<Input> grad_input(a.grad_input, a.cols, buffers, kRowsPerGroup);
    const DropoutRows dropout(a.dropout, a.cols, buffers, kRowsPerGroup);
    Acc* const sums[1] = {buffers.take<Acc>(a.cols)};
    const auto batch = [&](std::int64_t first, std::int64_t last) {
      for_each_row_group(first, last, [&](std::int64_t row, auto count) {
        const Stream* from[count];
        Input* to[count];
        const std::uint16_t* draws[count];
        for (int k = 0; k < count; ++k) {
          from[k] = grad_output.row(row + k, k);
          to[k] = grad_input.row(row + k, k);
          draws[k] = dropout.row(row + k, k);
        }
        residual_add_backward_group(from, draws, dropout.threshold, static_cast<Acc>(dropout.scale), a.cols, to, sums[0]);
        for (int k = 0; k < count; ++k) grad_input.commit(row + k, k);
      });
    };
    for (std::int64_t block = begin; block < end; ++block) column_sums.accumulate(block, a.rows, sums, batch);
  });
  column_sums.finish(parallel_for);
}

inline void residual_add_backward(const ResidualAddBackward& a, ParallelFor parallel_for) {
  const auto branch = [&](auto tag) { return all_are<typename decltype(tag)::Type>(a.grad_input); };
  const auto stream = [&](auto tag) { return all_are<typename decltype(tag)::Type>(a.grad_output); };
  using B = BFloat16;
  using H = Float16;
  if (any_float64(a.grad_output, a.grad_input)) return residual_add_backward_as<double, double>(a, parallel_for);
  if (stream(Tag<B>{}) && branch(Tag<B>{})) return residual_add_backward_as<B, B>(a, parallel_for);
  if (stream(Tag<H>{}) && branch(Tag<H>{})) return residual_add_backward_as<H, H>(a, parallel_for);
  if (stream(Tag<float>{}) && branch(Tag<B>{})) return residual_add_backward_as<float, B>(a, parallel_for);
  if (stream(Tag<float>{}) && branch(Tag<H>{})) return residual_add_backward_as<float, H>(a, parallel_for);
  residual_add_backward_as<float, float>(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
