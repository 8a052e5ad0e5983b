// SPDX-License-Identifier: BSD-3-Clause
// The norms, forward: of the input, or of sum = residual + dropout(input + input_bias) before it is rounded. Every
// operand is read once from memory; the further sweeps over a row read from the caches.
#pragma once

#include <cstdint>

#include "loops.h"
#include "parallel.h"
#include "residual_sum.h"
#include "row_buffer.h"
#include "row_statistics.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <bool kCentered, class T>
void norm_rows(const NormForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<T>;
  RowBuffers buffers;
  const RowReader<T> input(a.input, a.cols, buffers, kRowsPerGroup);
  const RowWriter<T> output(a.output, a.cols, buffers, kRowsPerGroup);
  const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
  const Acc* bias = kCentered ? vector_or(a.bias, Acc(0), a.cols, buffers) : nullptr;
  const bool bypass = a.output.data != a.input.data && output.may_bypass_caches(a.rows, 2);
  for_each_group<Acc>(begin, end, [&](std::int64_t first, auto group) RESNORM_INLINE_LAMBDA {
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
    MomentSums<kCentered, Acc> moments[kRows];
    add_moments(a.cols, value, moments);
    RowStatistics<Acc> statistics[kRows];
    row_statistics(a.cols, a.eps, moments, inputs, statistics);
    with_non_temporal<kRows>(bypass, [&](auto kNonTemporal) RESNORM_INLINE_LAMBDA {
      normalize_rows<kCentered, kNonTemporal>(
          inputs, a.cols, statistics, weight, bias, outputs, [](auto...) RESNORM_INLINE_LAMBDA {},
          [&](auto k, std::int64_t i) RESNORM_INLINE_LAMBDA { prefetch(next[k] + i); });
    });
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      store_statistics(statistics[k], first + k, a.mean, a.rstd);
      output.commit(first + k, k);
    });
  });
  if (bypass) non_temporal_fence();
}

template <bool kCentered, class Input, class Residual, class Sum, class Output>
void add_norm_rows(const NormForward& a, std::int64_t begin, std::int64_t end) {
  using Acc = Accumulation<Sum, Output>;
  RowBuffers buffers;
  const ResidualSumRows<Input, Residual, Acc> sums(a, buffers);
  const RowWriter<Sum> rounded(a.sum, a.cols, buffers, kRowsPerGroup);
  const RowWriter<Output> output(a.output, a.cols, buffers, kRowsPerGroup);
  const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
  const Acc* bias = kCentered ? vector_or(a.bias, Acc(0), a.cols, buffers) : nullptr;
  const auto apart = [&](const Rows& result) { return result.data != a.input.data && result.data != a.residual.data; };
  const int matrices = a.sum.data == nullptr ? 3 : 4;
  const bool sum_bypasses = !kSame<Acc, double> && apart(a.sum) && rounded.may_bypass_caches(a.rows, matrices);
  // A sum that is stored unrounded, and not past the caches, is read again where it lies.
  const bool in_place = kSame<Sum, Acc> && a.sum.data != nullptr && !sum_bypasses;
  const bool writes_sum = a.sum.data != nullptr && !in_place;
  const bool bypass = apart(a.output) && output.may_bypass_caches(a.rows, matrices) && (sum_bypasses || !writes_sum);
  Acc* buffer = in_place ? nullptr : buffers.take<Acc>(kRowsPerGroup * a.cols);
  for_each_group<Acc>(begin, end, [&](std::int64_t first, auto group) RESNORM_INLINE_LAMBDA {
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
    MomentSums<kCentered, Acc> moments[kRows];
    sums.template with_rows<kRows>(first, [&](const auto& sum) RESNORM_INLINE_LAMBDA {
      const auto value = [&](auto k, std::int64_t i, auto lanes) RESNORM_INLINE_LAMBDA {
        const Vec<Acc> x = sum(k, i, lanes);
        x.store(unrounded[k] + i, lanes);
        return x;
      };
      add_moments(a.cols, value, moments);
    });
    RowStatistics<Acc> statistics[kRows];
    row_statistics(a.cols, a.eps, moments, unrounded, statistics);
    with_non_temporal<kRows>(bypass, [&](auto kNonTemporal) RESNORM_INLINE_LAMBDA {
      with_flag(writes_sum, [&](auto kWritesSum) RESNORM_INLINE_LAMBDA {
        normalize_rows<kCentered, kNonTemporal>(
            unrounded, a.cols, statistics, weight, bias, outputs,
            [&](auto k, std::int64_t i, Vec<Acc> x, auto lanes) RESNORM_INLINE_LAMBDA {
              if constexpr (kWritesSum) put<kNonTemporal>(x, sum_rows[k] + i, lanes);
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
  if (bypass) non_temporal_fence();
}

using NormRange = void (*)(const NormForward& a, std::int64_t begin, std::int64_t end);

// The loop for the types of a norm's input and output, or null where the base has it.
template <bool kCentered>
NormRange norm_range(const NormForward& a) {
  NormRange range = nullptr;
  if constexpr (kHasLoops<float>) {
    range = any_float64(a.input, a.output) ? norm_rows<kCentered, double> : norm_rows<kCentered, float>;
  }
  for_each_half([&](auto tag) {
    using Half = typename decltype(tag)::Type;
    if (all_are<Half>(a.input, a.output)) range = norm_rows<kCentered, Half>;
  });
  return range;
}

// The same beside a residual. A sum that is not stored has its dtype all the same.
template <bool kCentered>
NormRange add_norm_range(const NormForward& a) {
  NormRange range = nullptr;
  if constexpr (kHasLoops<float>) {
    const bool float64 = a.sum.dtype == DType::kFloat64 || a.output.dtype == DType::kFloat64;
    range = float64 ? add_norm_rows<kCentered, double, double, double, double>
                    : add_norm_rows<kCentered, float, float, float, float>;
  }
  for_each_half([&](auto tag) {
    using Half = typename decltype(tag)::Type;
    if (!all_are<Half>(a.input, a.output)) return;
    // Beside a sum in float32 a residual in a half type, as a model's first may be, is converted.
    if (a.sum.dtype == DType::kFloat32) range = add_norm_rows<kCentered, Half, float, float, Half>;
    if (a.sum.dtype == kDType<Half> && all_are<Half>(a.residual))
      range = add_norm_rows<kCentered, Half, Half, Half, Half>;
  });
  return range;
}

inline void norm_forward(const NormForward& a, ParallelFor parallel_for) {
  const bool adds = a.residual.data != nullptr;
  const auto range = a.centered ? (adds ? add_norm_range<true>(a) : norm_range<true>(a))
                                : (adds ? add_norm_range<false>(a) : norm_range<false>(a));
  if (range == nullptr) return base::norm_forward_kernels.norm_forward(a, parallel_for);
  parallel_rows(parallel_for, a.rows, a.cols, [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
