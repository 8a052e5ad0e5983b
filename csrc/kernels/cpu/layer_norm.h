// SPDX-License-Identifier: BSD-3-Clause
// output = (input - mean) * rstd * weight + bias. Each row is read once from memory and twice more from the first
// cache.
#pragma once

#include <cstdint>

#include "norm_backward.h"
#include "parallel.h"
#include "prefetch.h"
#include "row_buffer.h"
#include "row_statistics.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class T>
void layer_norm_rows(const LayerNormForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<T>;
  RowBuffers buffers;
  const RowReader<T> input(a.input, a.cols, buffers);
  const RowWriter<T> output(a.output, a.cols, buffers);
  const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
  const Acc* bias = vector_or(a.bias, Acc(0), a.cols, buffers);
  // Half types are widened once, by the first sweep.
  Acc* widened = kSame<T, Acc> ? nullptr : buffers.take<Acc>(a.cols);
  const double reciprocal_cols = 1.0 / static_cast<double>(a.cols);
  const bool far = are_far<T, T>(a.rows, a.cols);
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t next = row + 1 < end ? row + 1 : row;
    const T* input_row = input.row(row);
    const Acc mean = row_mean<Acc>(
        a.cols, reciprocal_cols,
        [&](std::int64_t i, auto lanes) RESNORM_INLINE_LAMBDA { return Vec<Acc>::load(input_row + i, lanes); },
        [&](std::int64_t i, Vec<Acc> x, auto lanes) RESNORM_INLINE_LAMBDA {
          if constexpr (!kSame<T, Acc>) x.store(widened + i, lanes);
        });
    const Acc* values = widened;
    if constexpr (kSame<T, Acc>) values = input_row;
    const auto statistics = row_statistics(values, a.cols, reciprocal_cols, mean, a.eps,
                                           NextRows(far, input.ahead(next), output.ahead(next)));
    store_statistics(statistics, row, a.mean, a.rstd);
    normalize_row(values, a.cols, statistics, weight, bias, output.row(row));
    output.commit(row);
  }
}

inline void layer_norm_forward(const LayerNormForward& a, ParallelFor parallel_for) {
  auto* range = any_float64(a.input, a.output) ? layer_norm_rows<double> : layer_norm_rows<float>;
  if constexpr (kHasHalfLoops) {
    if (all_are<BFloat16>(a.input, a.output)) range = layer_norm_rows<BFloat16>;
    if (all_are<Float16>(a.input, a.output)) range = layer_norm_rows<Float16>;
  }
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

inline void layer_norm_backward(const LayerNormBackward& a, ParallelFor parallel_for) {
  norm_backward({.rows = a.rows,
                 .cols = a.cols,
                 .grad_output = a.grad_output,
                 .grad_sum = {},
                 .sum = a.input,
                 .weight = a.weight,
                 .mean = a.mean,
                 .rstd = a.rstd,
                 .dropout = {},
                 .grad_input = {},
                 .grad_residual = a.grad_input,
                 .grad_weight = a.grad_weight,
                 .grad_bias = a.grad_bias,
                 .grad_input_bias = {},
                 .workspace = a.workspace},
                parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
