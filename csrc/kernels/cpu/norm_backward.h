// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of add_layer_norm, and of layer_norm, which is the same without dropout and grad_sum.
//
// With d = s - mean, x = (d - delta) * rstd and g = grad_output * weight, a row's gradient is
//   grad_residual = grad_sum + rstd * (g - sum(g) / N - x * sum(g x) / N)
// and grad_weight = sum over rows of grad_output x, grad_bias = sum over rows of grad_output. The first sweep over a row
// sums g, g d and d (which gives delta, the part of the mean that its float32 does not hold); the second, from the first
// cache, writes everything. Rows go four at a time: weight and column sums are loaded and stored once for all of them.
#pragma once

#include <cstdint>

#include "column_sums.h"
#include "dropout.h"
#include "parallel.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

enum NormColumnSum { kGradWeight, kGradBias, kGradInputBias, kNormColumnSums };

// A group of rows. G is the type of grad_output and grad_input, S that of sum, grad_sum and grad_residual.
template <class G, class S, int kRows>
struct NormBackwardGroup {
  using Acc = Accumulation<G, S>;

  const G* grad_output[kRows];
  const S* sum[kRows];
  const S* grad_sum[kRows];
  S* grad_residual[kRows];
  G* grad_input[kRows];
  const std::uint16_t* draws[kRows];
  Acc mean[kRows], rstd[kRows];

  // The rows of the next group, to prefetch them where the matrices are far.
  bool far;
  const G *next_grad_output[kRows], *next_grad_input[kRows];
  const S *next_sum[kRows], *next_grad_sum[kRows], *next_grad_residual[kRows];
};

// What the second sweep needs of a row: grad_residual = g * rstd + (d - delta) * scale + offset.
template <class Acc>
struct NormBackwardRow {
  Acc delta, scale, offset;
};

template <class G, class S, int kRows, class Acc>
RESNORM_INLINE void norm_backward_sums(const NormBackwardGroup<G, S, kRows>& group, std::int64_t cols,
                                       const Acc* weight, NormBackwardRow<Acc> (&rows)[kRows]) {
  using V = Vec<Acc>;
  constexpr int kSlots = 4 / kRows;
  V g_sums[kRows][kSlots] = {}, gd_sums[kRows][kSlots] = {}, d_sums[kRows][kSlots] = {};
  for_each_vector<Acc, kSlots>(cols, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
    const V w = V::load(weight + i, lanes);
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V g = V::load(group.grad_output[k] + i, lanes) * w;
      const V d = (V::load(group.sum[k] + i, lanes) - V::broadcast(group.mean[k])).only(lanes);
      g_sums[k][slot] = g_sums[k][slot] + g;
      gd_sums[k][slot] = fma(g, d, gd_sums[k][slot]);
      d_sums[k][slot] = d_sums[k][slot] + d;
    });
  });
  const Acc reciprocal_cols = Acc(1) / static_cast<Acc>(cols);
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    const Acc g_mean = total(g_sums[k]) * reciprocal_cols, gd_mean = total(gd_sums[k]) * reciprocal_cols;
    const Acc delta = total(d_sums[k]) * reciprocal_cols, rstd = group.rstd[k];
    const Acc gx_mean = (gd_mean - delta * g_mean) * rstd;
    rows[k] = {delta, -gx_mean * rstd * rstd, -g_mean * rstd};
  });
}

template <bool kHasGradSum, bool kHasBranch, class G, class S, int kRows, class Acc>
RESNORM_INLINE void norm_backward_apply(const NormBackwardGroup<G, S, kRows>& group, std::int64_t cols,
                                        const Acc* weight, const NormBackwardRow<Acc> (&rows)[kRows],
                                        std::uint32_t threshold, Acc dropout_scale, Acc* const (&sums)[kNormColumnSums]) {
  using V = Vec<Acc>;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    const V w = V::load(weight + i, lanes);
    // The group's rows are summed before they join the running sums: fewer roundings of the large numbers.
    if (group.far) {
      unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
        prefetch(group.next_grad_output[k] + i);
        prefetch(group.next_sum[k] + i);
        prefetch(group.next_grad_residual[k] + i);
        if constexpr (kHasGradSum) prefetch(group.next_grad_sum[k] + i);
        if constexpr (kHasBranch) prefetch(group.next_grad_input[k] + i);
      });
    }
    V weight_sum = {}, bias_sum = {}, input_bias_sum = {};
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V rstd = V::broadcast(group.rstd[k]);
      const V d = V::load(group.sum[k] + i, lanes) - V::broadcast(group.mean[k]) - V::broadcast(rows[k].delta);
      const V grad_output = V::load(group.grad_output[k] + i, lanes), scaled = grad_output * rstd;
      weight_sum = k == 0 ? scaled * d : fma(scaled, d, weight_sum);
      bias_sum = k == 0 ? grad_output : bias_sum + grad_output;
      V grad = fma(scaled, w, fma(d, V::broadcast(rows[k].scale), V::broadcast(rows[k].offset)));
      if constexpr (kHasGradSum) grad = grad + V::load(group.grad_sum[k] + i, lanes);
      grad.store(group.grad_residual[k] + i, lanes);
      if constexpr (kHasBranch) {
        const V branch = (grad * V::broadcast(dropout_scale)).keep(group.draws[k] + i, threshold);
        branch.store(group.grad_input[k] + i, lanes);
        input_bias_sum = k == 0 ? branch : input_bias_sum + branch;
      }
    });
    const auto add = [&](NormColumnSum which, V sum) RESNORM_INLINE_LAMBDA {
      (V::load(sums[which] + i, lanes) + sum).store(sums[which] + i, lanes);
    };
    add(kGradWeight, weight_sum);
    add(kGradBias, bias_sum);
    if constexpr (kHasBranch) add(kGradInputBias, input_bias_sum);
  });
}

// All blocks of rows, for one pair of types. kHasBranch: a gradient behind the dropout is wanted.
template <class G, class S, bool kHasGradSum, bool kHasBranch>
void norm_backward_as(const AddLayerNormBackward& a, ParallelFor parallel_for) {
  using Acc = Accumulation<G, S>;
  const ColumnSums<Acc, kNormColumnSums> column_sums({a.grad_weight, a.grad_bias, a.grad_input_bias}, a.rows, a.cols,
                                                     a.workspace);
  const auto* mean = static_cast<const Acc*>(a.mean);
  const auto* rstd = static_cast<const Acc*>(a.rstd);
  parallel(parallel_for, column_sums.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const RowReader<G> grad_output(a.grad_output, a.cols, buffers, kRowsPerGroup);
    const RowReader<S> sum(a.sum, a.cols, buffers, kRowsPerGroup);
    const RowReader<S> grad_sum(a.grad_sum, a.cols, buffers, kRowsPerGroup);
    const RowWriter<S> grad_residual(a.grad_residual, a.cols, buffers, kRowsPerGroup);
    const RowWriter<G> grad_input(a.grad_input, a.cols, buffers, kRowsPerGroup);
    const DropoutRows dropout(a.dropout, a.cols, buffers, kRowsPerGroup);
    const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
    Acc* const sums[kNormColumnSums] = {buffers.take<Acc>(a.cols), buffers.take<Acc>(a.cols),
                                        buffers.take<Acc>(a.cols)};
    const bool far = is_far<G>(a.rows, a.cols);
    const auto batch = [&](std::int64_t first, std::int64_t last) {
      for_each_row_group(first, last, [&](std::int64_t row, auto count) {
        NormBackwardGroup<G, S, count> group;
        NormBackwardRow<Acc> rows[count];
        group.far = far;
        for (int k = 0; k < count; ++k) {
          const std::int64_t next = row + count + k < last ? row + count + k : row + k;
          group.next_grad_output[k] = grad_output.ahead(next);
          group.next_sum[k] = sum.ahead(next);
          group.next_grad_residual[k] = grad_residual.ahead(next);
          if constexpr (kHasGradSum) group.next_grad_sum[k] = grad_sum.ahead(next);
          if constexpr (kHasBranch) group.next_grad_input[k] = grad_input.ahead(next);
          group.grad_output[k] = grad_output.row(row + k, k);
          group.sum[k] = sum.row(row + k, k);
          group.grad_residual[k] = grad_residual.row(row + k, k);
          if constexpr (kHasGradSum) group.grad_sum[k] = grad_sum.row(row + k, k);
          if constexpr (kHasBranch) {
            group.grad_input[k] = grad_input.row(row + k, k);
            group.draws[k] = dropout.row(row + k, k);
          }
          group.mean[k] = mean[row + k];
          group.rstd[k] = rstd[row + k];
        }
        norm_backward_sums(group, a.cols, weight, rows);
        norm_backward_apply<kHasGradSum, kHasBranch>(group, a.cols, weight, rows, dropout.threshold,
                                                     static_cast<Acc>(dropout.scale), sums);
        for (int k = 0; k < count; ++k) {
          grad_residual.commit(row + k, k);
          if constexpr (kHasBranch) grad_input.commit(row + k, k);
        }
      });
    };
    for (std::int64_t block = begin; block < end; ++block) column_sums.accumulate(block, a.rows, sums, batch);
  });
  column_sums.finish(parallel_for);
}

template <class G, class S>
void norm_backward_with(const AddLayerNormBackward& a, ParallelFor parallel_for) {
  const bool branch = a.grad_input.data != nullptr || a.grad_input_bias.data != nullptr;
  if (a.grad_sum.data != nullptr) {
    branch ? norm_backward_as<G, S, true, true>(a, parallel_for) : norm_backward_as<G, S, true, false>(a, parallel_for);
  } else {
    branch ? norm_backward_as<G, S, false, true>(a, parallel_for)
           : norm_backward_as<G, S, false, false>(a, parallel_for);
  }
}

inline void norm_backward(const AddLayerNormBackward& a, ParallelFor parallel_for) {
  const auto outer = [&](auto tag) {
    return all_are<typename decltype(tag)::Type>(a.grad_output, a.grad_input);
  };
  const auto stream = [&](auto tag) {
    return all_are<typename decltype(tag)::Type>(a.sum, a.grad_sum, a.grad_residual);
  };
  if (any_float64(a.grad_output, a.sum)) return norm_backward_with<double, double>(a, parallel_for);
  if (outer(Tag<BFloat16>{}) && stream(Tag<BFloat16>{})) return norm_backward_with<BFloat16, BFloat16>(a, parallel_for);
  if (outer(Tag<Float16>{}) && stream(Tag<Float16>{})) return norm_backward_with<Float16, Float16>(a, parallel_for);
  if (outer(Tag<BFloat16>{}) && stream(Tag<float>{})) return norm_backward_with<BFloat16, float>(a, parallel_for);
  if (outer(Tag<Float16>{}) && stream(Tag<float>{})) return norm_backward_with<Float16, float>(a, parallel_for);
  norm_backward_with<float, float>(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
