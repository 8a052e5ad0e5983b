// SPDX-License-Identifier: BSD-3-Clause
// output = residual + dropout(input + input_bias), and its backward pass: grad_input = dropout'(grad_output).
#pragma once

#include <cstdint>

#include "column_sums.h"
#include "dropout.h"
#include "loops.h"
#include "parallel.h"
#include "residual_sum.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class Input, class Residual>
void residual_add_rows(const ResidualAddForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<Input, Residual>;
  RowBuffers buffers;
  const ResidualSumRows<Input, Residual, Acc> sums(a, buffers);
  const RowWriter<Residual> output(a.output, a.cols, buffers);
  const bool bypass =
      a.output.data != a.input.data && a.output.data != a.residual.data && output.may_bypass_caches(a.rows, 3);
  with_flag(bypass, [&](auto kNonTemporal) RESNORM_INLINE_LAMBDA {
    for (std::int64_t row = begin; row < end; ++row) {
      Residual* to = output.row(row);
      sums.template with_rows<1>(row, [&](const auto& sum) RESNORM_INLINE_LAMBDA {
        for_each_vector<Acc, 4>(a.cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
          put<kNonTemporal>(sum(Index<0>{}, i, lanes), to + i, lanes);
        });
      });
      output.commit(row);
    }
  });
  if (bypass) non_temporal_fence();
}

inline void residual_add_forward(const ResidualAddForward& a, ParallelFor parallel_for) {
  void (*range)(const ResidualAddForward&, std::int64_t begin, std::int64_t end) = nullptr;
  if constexpr (kHasLoops<float>) {
    range = any_float64(a.input, a.residual, a.output) ? residual_add_rows<double, double>
                                                       : residual_add_rows<float, float>;
  }
  for_each_half([&](auto tag) {
    using Half = typename decltype(tag)::Type;
    if (!all_are<Half>(a.input)) return;
    if (all_are<float>(a.residual, a.output)) range = residual_add_rows<Half, float>;
    if (all_are<Half>(a.residual, a.output)) range = residual_add_rows<Half, Half>;
  });
  if (range == nullptr) return base::residual_add_kernels.residual_add_forward(a, parallel_for);
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

template <class Gradient, class Input>
void residual_add_backward_as(const ResidualAddBackward& a, ParallelFor parallel_for) {
  using Acc = Accumulation<Gradient, Input>;
  using V = Vec<Acc>;
  const ColumnSums<Acc, 1> column_sums(&a.grad_input_bias, a.rows, a.cols, a.workspace);
  parallel(parallel_for, column_sums.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const RowReader<Gradient> grad_output(a.grad_output, a.cols, buffers, kRowsPerGroup);
    const RowWriter<Input> grad_input(a.grad_input, a.cols, buffers, kRowsPerGroup);
    const DropoutRows dropout(a.dropout, a.cols, buffers, kRowsPerGroup);
    Acc* const scratch[] = {buffers.take<Acc>(a.cols)};
    const bool bypass = grad_input.may_bypass_caches(a.rows, 2);
    with_flag(bypass, [&](auto kNonTemporal) RESNORM_INLINE_LAMBDA {
      const auto batch = [&](std::int64_t batch_begin, std::int64_t batch_end, Acc* const(&sums)[1]) {
        for_each_group<Acc>(batch_begin, batch_end, [&](std::int64_t first, auto count) RESNORM_INLINE_LAMBDA {
          const Gradient* from[count];
          const std::uint16_t* draws[count];
          Input* to[count];
          unrolled<count>([&](auto k) RESNORM_INLINE_LAMBDA {
            from[k] = grad_output.row(first + k, k);
            draws[k] = dropout.row(first + k, k);
            to[k] = grad_input.row(first + k, k);
          });
          for_each_vector<Acc, 1>(a.cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
            V sum = {};
            unrolled<count>([&](auto k) RESNORM_INLINE_LAMBDA {
              const V scaled = V::load(from[k] + i, lanes) * V::broadcast(static_cast<Acc>(dropout.scale));
              const V grad = scaled.keep(draws[k] + i, dropout.threshold);
              put<kNonTemporal>(grad, to[k] + i, lanes);
              sum = k == 0 ? grad : sum + grad;
            });
            (V::load(sums[0] + i, lanes) + sum).store(sums[0] + i, lanes);
          });
          for (int k = 0; k < count; ++k) grad_input.commit(first + k, k);
        });
      };
      for (std::int64_t block = begin; block < end; ++block) column_sums.accumulate(block, a.rows, scratch, batch);
    });
    if (bypass) non_temporal_fence();
  });
  column_sums.finish(parallel_for);
}

inline void residual_add_backward(const ResidualAddBackward& a, ParallelFor parallel_for) {
  void (*run)(const ResidualAddBackward&, ParallelFor) = base::residual_add_kernels.residual_add_backward;
  if constexpr (kHasLoops<float>) {
    run = any_float64(a.grad_output, a.grad_input) ? residual_add_backward_as<double, double>
                                                   : residual_add_backward_as<float, float>;
  }
  for_each_half([&](auto tag) {
    using Half = typename decltype(tag)::Type;
    if (!all_are<Half>(a.grad_input)) return;
    if (all_are<float>(a.grad_output)) run = residual_add_backward_as<float, Half>;
    if (all_are<Half>(a.grad_output)) run = residual_add_backward_as<Half, Half>;
  });
  run(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
