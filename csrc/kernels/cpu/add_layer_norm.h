// SPDX-License-Identifier: BSD-3-Clause
// sum = residual + dropout(input + input_bias); output = layer_norm(sum), from the sum before it is rounded. Input and
// residual are read once from memory; the two further sweeps read the unrounded sum from the first cache.
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
  with_branch_flags(a, [&](auto has_bias, auto has_dropout) {
    RowBuffers buffers;
    const ResidualSumRows<Input, Residual, Acc, has_bias.value, has_dropout.value> sums(a, buffers);
    const RowWriter<Sum> rounded(a.sum, a.cols, buffers);
    const RowWriter<Output> output(a.output, a.cols, buffers);
    Acc* unrounded = kSame<Sum, Acc> ? nullptr : buffers.take<Acc>(a.cols);
    const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
    const Acc* bias = vector_or(a.bias, Acc(0), a.cols, buffers);
    const Acc reciprocal_cols = Acc(1) / static_cast<Acc>(a.cols);
    const bool far = is_far<Input>(a.rows, a.cols);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t next = row + 1 < end ? row + 1 : row;
      const Input* next_input = sums.input_ahead(next);
      const Residual* next_residual = sums.residual_ahead(next);
      const Sum* next_sum = rounded.ahead(next);
      const Output* next_output = output.ahead(next);
      Sum* sum = rounded.row(row);
      if constexpr (kSame<Sum, Acc>) unrounded = sum;
      const Acc mean = row_mean<Acc>(
          a.cols, reciprocal_cols, sums.row(row),
          [&](std::int64_t i, Vec<Acc> value, auto lanes) RESNORM_INLINE_LAMBDA {
            value.store(unrounded + i, lanes);
            if constexpr (!kSame<Sum, Acc>) value.store(sum + i, lanes);
          });
      const auto statistics = row_statistics<Acc>(unrounded, a.cols, reciprocal_cols, mean, a.eps,
                                                  [&](std::int64_t i) RESNORM_INLINE_LAMBDA {
                                                    if (!far) return;
                                                    prefetch(next_input + i);
                                                    prefetch(next_residual + i);
                                                    prefetch(next_sum + i);
                                                    prefetch(next_output + i);
                                                  });
      store_statistics(statistics, row, a.mean, a.rstd);
      normalize_row(unrounded, a.cols, statistics, weight, bias, output.row(row));
      rounded.commit(row);
      output.commit(row);
    }
  });
}

inline void add_layer_norm_forward(const AddLayerNormForward& a, ParallelFor parallel_for) {
  const auto branch = [&](auto tag) { return all_are<typename decltype(tag)::Type>(a.input, a.output); };
  const auto stream = [&](auto tag) { return all_are<typename decltype(tag)::Type>(a.residual, a.sum); };
  const auto narrow = [&](auto tag) {
    return all_are<typename decltype(tag)::Type>(a.input, a.residual, a.output) && all_are<float>(a.sum);
  };
  using B = BFloat16;
  using H = Float16;
  // The residual's type counts where it is the sum's, which is not stored.
  const bool float64 = any_float64(a.sum, a.output) || (a.sum.data == nullptr && any_float64(a.residual));
  auto* range = float64 ? add_layer_norm_rows<double, double, double, double>
                                             : add_layer_norm_rows<float, float, float, float>;
  if (branch(Tag<B>{}) && stream(Tag<float>{})) range = add_layer_norm_rows<B, float, float, B>;
  if (branch(Tag<H>{}) && stream(Tag<float>{})) range = add_layer_norm_rows<H, float, float, H>;
  if (branch(Tag<B>{}) && stream(Tag<B>{})) range = add_layer_norm_rows<B, B, B, B>;
  if (branch(Tag<H>{}) && stream(Tag<H>{})) range = add_layer_norm_rows<H, H, H, H>;
  if (narrow(Tag<B>{})) range = add_layer_norm_rows<B, B, float, B>;
  if (narrow(Tag<H>{})) range = add_layer_norm_rows<H, H, float, H>;
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

inline void add_layer_norm_backward(const AddLayerNormBackward& a, ParallelFor parallel_for) {
  norm_backward(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
