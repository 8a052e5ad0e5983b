// SPDX-License-Identifier: BSD-3-Clause
// sum = residual + dropout(input + input_bias); output = layer_norm(sum), from the sum before it is rounded. Input and
// residual are read once from memory; the two further sweeps read the unrounded sum from the caches.
#pragma once

#include <cstdint>

#include "norm_backward.h"
#include "parallel.h"
#include "residual_sum.h"
#include "row_buffer.h"
#include "row_statistics.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class Input, class Residual, class Sum, class Output>
void add_layer_norm_rows(const AddLayerNormForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<Sum, Output>;
  RowBuffers buffers;
  const ResidualSumRows<Input, Residual, Acc> sums(a, buffers);
  const RowWriter<Sum> rounded(a.sum, a.cols, buffers, kRowsPerGroup);
  const RowWriter<Output> output(a.output, a.cols, buffers, kRowsPerGroup);
  const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
  const Acc* bias = vector_or(a.bias, Acc(0), a.cols, buffers);
  const auto apart = [&](const Rows& result) { return result.data != a.input.data && result.data != a.residual.data; };
  const int matrices = a.sum.data == nullptr ? 3 : 4;
  const bool streams_sum = apart(a.sum) && rounded.may_stream(a.rows, matrices);
  // A sum that is stored unrounded, and not past the caches, is read again where it lies.
  const bool in_place = kSame<Sum, Acc> && a.sum.data != nullptr && !streams_sum;
  const bool writes_sum = a.sum.data != nullptr && !in_place;
  const bool stream = apart(a.output) && output.may_stream(a.rows, matrices) && (streams_sum || !writes_sum);
  Acc* buffer = in_place ? nullptr : buffers.take<Acc>(kRowsPerGroup * a.cols);
  for_each_group(begin, end, [&](std::int64_t first, auto group) RESNORM_INLINE_LAMBDA {
    constexpr int kRows = group;
    Acc* unrounded[kRows];
    Sum* sum_rows[kRows];
    Output* outputs[kRows];
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      sum_rows[k] = rounded.row(first + k, k);
      outputs[k] = output.row(first + k, k);
      if constexpr (kSame<Sum, Acc>) {
        unrounded[k] = in_place ? sum_rows[k] : buffer + k * a.cols;
      } else {
        unrounded[k] = buffer + k * a.cols;
      }
    });
    const auto next = sums.template next<kRows>(first);
    RowStatistics<Acc> statistics[kRows];
    sums.template with_rows<kRows>(first, [&](const auto& sum) RESNORM_INLINE_LAMBDA {
      const auto value = [&](auto k, std::int64_t i, auto lanes) RESNORM_INLINE_LAMBDA {
        const Vec<Acc> x = sum(k, i, lanes);
        x.store(unrounded[k] + i, lanes);
        return x;
      };
      row_statistics(a.cols, a.eps, value, unrounded, statistics);
    });
    with_flag(stream, [&](auto kStream) RESNORM_INLINE_LAMBDA {
      with_flag(writes_sum, [&](auto kWritesSum) RESNORM_INLINE_LAMBDA {
        normalize_rows<kStream>(
            unrounded, a.cols, statistics, weight, bias, outputs,
            [&](auto k, std::int64_t i, Vec<Acc> x, auto lanes) RESNORM_INLINE_LAMBDA {
              if constexpr (kWritesSum) put<kStream>(x, sum_rows[k] + i, lanes);
            },
            [&](auto k, std::int64_t i) RESNORM_INLINE_LAMBDA {
              prefetch(next.input[k] + i);
              prefetch(next.residual[k] + i);
            });
      });
    });
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      store_statistics(statistics[k], first + k, a.mean, a.rstd);
      rounded.commit(first + k, k);
      output.commit(first + k, k);
    });
  });
  if (stream) stream_fence();
}

inline void add_layer_norm_forward(const AddLayerNormForward& a, ParallelFor parallel_for) {
  const bool float64 = a.sum.dtype == DType::kFloat64 || a.output.dtype == DType::kFloat64;
  auto* range =
      float64 ? add_layer_norm_rows<double, double, double, double> : add_layer_norm_rows<float, float, float, float>;
  if constexpr (kHasHalfLoops) {
    const auto add_half = [&](auto tag) {
      using Half = typename decltype(tag)::Type;
      if (!all_are<Half>(a.input, a.output)) return;
      if (all_are<float>(a.residual, a.sum)) range = add_layer_norm_rows<Half, float, float, Half>;
      if (all_are<Half>(a.residual, a.sum)) range = add_layer_norm_rows<Half, Half, Half, Half>;
      if (all_are<Half>(a.residual) && all_are<float>(a.sum)) range = add_layer_norm_rows<Half, Half, float, Half>;
    };
    add_half(Tag<BFloat16>{});
    add_half(Tag<Float16>{});
  }
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

inline void add_layer_norm_backward(const AddLayerNormBackward& a, ParallelFor parallel_for) {
  norm_backward(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
