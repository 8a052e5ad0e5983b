// SPDX-License-Identifier: BSD-3-Clause
// output = (input - mean) * rstd * weight + bias. Each row is read once from memory and twice more from the caches.
#pragma once

#include <cstdint>

#include "norm_backward.h"
#include "parallel.h"
#include "row_buffer.h"
#include "row_statistics.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class T>
void layer_norm_rows(const LayerNormForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<T>;
  RowBuffers buffers;
  const RowReader<T> input(a.input, a.cols, buffers, kRowsPerGroup);
  const RowWriter<T> output(a.output, a.cols, buffers, kRowsPerGroup);
  const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
  const Acc* bias = vector_or(a.bias, Acc(0), a.cols, buffers);
  const bool stream = a.output.data != a.input.data && output.may_stream(a.rows, 2);
  for_each_group(begin, end, [&](std::int64_t first, auto group) RESNORM_INLINE_LAMBDA {
    constexpr int kRows = group;
    const T *inputs[kRows], *next[kRows];
    T* outputs[kRows];
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      inputs[k] = input.row(first + k, k);
      next[k] = input.next(first + k, kRows);
      outputs[k] = output.row(first + k, k);
    });
    const auto value = [&](auto k, std::int64_t i, auto lanes)
                           RESNORM_INLINE_LAMBDA { return Vec<Acc>::load(inputs[k] + i, lanes); };
    RowStatistics<Acc> statistics[kRows];
    row_statistics(a.cols, a.eps, value, inputs, statistics);
    with_flag(stream, [&](auto kStream) RESNORM_INLINE_LAMBDA {
      normalize_rows<kStream>(
          inputs, a.cols, statistics, weight, bias, outputs, [](auto...) RESNORM_INLINE_LAMBDA {},
          [&](auto k, std::int64_t i) RESNORM_INLINE_LAMBDA { prefetch(next[k] + i); });
    });
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      store_statistics(statistics[k], first + k, a.mean, a.rstd);
      output.commit(first + k, k);
    });
  });
  if (stream) stream_fence();
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
