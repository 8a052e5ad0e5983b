// SPDX-License-Identifier: BSD-3-Clause
// sum = residual + dropout(input + input_bias); output = layer_norm(sum), from the sum before it is rounded. Input and
// residual are read once from memory; the two further sweeps read the unrounded sum from the first cache.
#pragma once

#include <cstdint>

#include "norm_backward.h"
#include "parallel.h"
#include "prefetch.h"
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
  const RowWriter<Sum> rounded(a.sum, a.cols, buffers);
  const RowWriter<Output> output(a.output, a.cols, buffers);
  Acc* unrounded = kSame<Sum, Acc> ? nullptr : buffers.take<Acc>(a.cols);
  const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
  const Acc* bias = vector_or(a.bias, Acc(0), a.cols, buffers);
  const double reciprocal_cols = 1.0 / static_cast<double>(a.cols);
  const bool far = are_far<Input, Residual, Sum, Output>(a.rows, a.cols);
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t next = row + 1 < end ? row + 1 : row;
    Sum* sum = rounded.row(row);
    if constexpr (kSame<Sum, Acc>) unrounded = sum;
    const Acc mean = sums.with_row(row, [&](const auto& value) RESNORM_INLINE_LAMBDA {
      return row_mean<Acc>(a.cols, reciprocal_cols, value,
                           [&](std::int64_t i, Vec<Acc> x, auto lanes) RESNORM_INLINE_LAMBDA {
                             x.store(unrounded + i, lanes);
                             if constexpr (!kSame<Sum, Acc>) x.store(sum + i, lanes);
                           });
    });
    const NextRows next_rows(far, sums.input_ahead(next), sums.residual_ahead(next), rounded.ahead(next),
                             output.ahead(next));
    const auto statistics = row_statistics<Acc>(unrounded, a.cols, reciprocal_cols, mean, a.eps, next_rows);
    store_statistics(statistics, row, a.mean, a.rstd);
    normalize_row(unrounded, a.cols, statistics, weight, bias, output.row(row));
    rounded.commit(row);
    output.commit(row);
  }
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
