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
  RowBuffers buffers;
  const ResidualSumRows<Input, Stream, Acc> sums(a, buffers);
  const RowWriter<Stream> output(a.output, a.cols, buffers);
  for (std::int64_t row = begin; row < end; ++row) {
    Stream* to = output.row(row);
    sums.with_row(row, [&](const auto& value) RESNORM_INLINE_LAMBDA {
      for_each_vector<Acc, 4>(a.cols, [&](std::int64_t i, auto, auto lanes)
                                          RESNORM_INLINE_LAMBDA { value(i, lanes).store(to + i, lanes); });
    });
    output.commit(row);
  }
}

inline void residual_add_forward(const ResidualAddForward& a, ParallelFor parallel_for) {
  auto* range =
      any_float64(a.input, a.residual, a.output) ? residual_add_rows<double, double> : residual_add_rows<float, float>;
  if constexpr (kHasHalfLoops) {
    const auto add_half = [&](auto tag) {
      using Half = typename decltype(tag)::Type;
      if (!all_are<Half>(a.input)) return;
      if (all_are<float>(a.residual, a.output)) range = residual_add_rows<Half, float>;
      if (all_are<Half>(a.residual, a.output)) range = residual_add_rows<Half, Half>;
    };
    add_half(Tag<BFloat16>{});
    add_half(Tag<Float16>{});
  }
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

template <class Stream, class Input>
struct ResidualAddBackwardRow {
  const Stream* grad_output;
  const std::uint16_t* draws;
  Input* grad_input;
};

template <class Stream, class Input, class Acc>
RESNORM_INLINE void residual_add_backward_group(const ResidualAddBackwardRow<Stream, Input> (&rows)[kRowsPerGroup],
                                                std::int64_t cols, const DropoutRows& dropout, Acc* sums) {
  using V = Vec<Acc>;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    V sum = {};
    unrolled<kRowsPerGroup>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V scaled = V::load(rows[k].grad_output + i, lanes) * V::broadcast(static_cast<Acc>(dropout.scale));
      const V grad = scaled.keep(rows[k].draws + i, dropout.threshold);
      grad.store(rows[k].grad_input + i, lanes);
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
    const RowReader<Stream> grad_output(a.grad_output, a.cols, buffers, kRowsPerGroup), zeros({}, a.cols, buffers);
    const RowWriter<Input> grad_input(a.grad_input, a.cols, buffers, kRowsPerGroup), discard({}, a.cols, buffers);
    const DropoutRows dropout(a.dropout, a.cols, buffers, kRowsPerGroup);
    Acc* const sums[1] = {buffers.take<Acc>(a.cols)};
    const auto batch = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; row += kRowsPerGroup) {
        ResidualAddBackwardRow<Stream, Input> rows[kRowsPerGroup];
        for (int k = 0; k < kRowsPerGroup; ++k) {
          if (row + k < last) {
            rows[k] = {grad_output.row(row + k, k), dropout.row(row + k, k), grad_input.row(row + k, k)};
          } else {
            rows[k] = {zeros.row(0), dropout.any(), discard.row(0)};
          }
        }
        residual_add_backward_group(rows, a.cols, dropout, sums[0]);
        for (int k = 0; k < kRowsPerGroup && row + k < last; ++k) grad_input.commit(row + k, k);
      }
    };
    for (std::int64_t block = begin; block < end; ++block) column_sums.accumulate(block, a.rows, sums, batch);
  });
  column_sums.finish(parallel_for);
}

inline void residual_add_backward(const ResidualAddBackward& a, ParallelFor parallel_for) {
  auto* run = any_float64(a.grad_output, a.grad_input) ? residual_add_backward_as<double, double>
                                                       : residual_add_backward_as<float, float>;
  if constexpr (kHasHalfLoops) {
    const auto add_half = [&](auto tag) {
      using Half = typename decltype(tag)::Type;
      if (!all_are<Half>(a.grad_input)) return;
      if (all_are<float>(a.grad_output)) run = residual_add_backward_as<float, Half>;
      if (all_are<Half>(a.grad_output)) run = residual_add_backward_as<Half, Half>;
    };
    add_half(Tag<BFloat16>{});
    add_half(Tag<Float16>{});
  }
  run(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
