// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of add_layer_norm, and of layer_norm, which is the same without dropout and grad_sum.
//
// With d = s - mean, x = (d - delta) * rstd and g = grad_output * weight, a row's gradient is
//   grad_residual = grad_sum + rstd * (g - sum(g) / N - x * sum(g x) / N)
// and grad_weight = sum over rows of grad_output x, grad_bias = sum over rows of grad_output. The first sweep over a
// row sums g, g d and d (which gives delta, the part of the mean that its float32 does not hold); the second, from the
// first cache, writes everything. Rows go four at a time: weight and column sums are loaded and stored once for all of
// them.
#pragma once

#include <cstdint>

#include "column_sums.h"
#include "dropout.h"
#include "parallel.h"
#include "prefetch.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

enum NormColumnSum { kGradWeight, kGradBias, kGradInputBias, kNormColumnSums };

// One row. G is the type of grad_output and grad_input, S that of sum, grad_sum and grad_residual.
template <class G, class S>
struct NormBackwardRow {
  using Acc = Accumulation<G, S>;

  const G* grad_output;
  const S* sum;
  const S* grad_sum;
  S* grad_residual;
  G* grad_input;
  const std::uint16_t* draws;
  Acc mean, rstd;
  // From the first sweep: grad_residual = grad_sum + g * rstd + (d - delta) * scale + offset.
  Acc delta, scale, offset;
  // The same operands of the row that takes this one's place in the next group, to be prefetched.
  const G *next_grad_output, *next_grad_input;
  const S *next_sum, *next_grad_sum, *next_grad_residual;
};

template <class G, class S>
using NormBackwardGroup = NormBackwardRow<G, S>[kRowsPerGroup];

template <class G, class S, class Acc>
RESNORM_NOINLINE void norm_backward_sums(NormBackwardGroup<G, S>& rows, std::int64_t cols, const Acc* weight) {
  using V = Vec<Acc>;
  double g_totals[kRowsPerGroup] = {}, gd_totals[kRowsPerGroup] = {}, d_totals[kRowsPerGroup] = {};
  for_each_piece(cols, [&](std::int64_t begin, std::int64_t size) RESNORM_INLINE_LAMBDA {
    V g_sums[kRowsPerGroup] = {}, gd_sums[kRowsPerGroup] = {}, d_sums[kRowsPerGroup] = {};
    for_each_vector<Acc, 1>(size, [&](std::int64_t piece_i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
      const std::int64_t i = begin + piece_i;
      const V w = V::load(weight + i, lanes);
      unrolled<kRowsPerGroup>([&](auto k) RESNORM_INLINE_LAMBDA {
        const V g = V::load(rows[k].grad_output + i, lanes) * w;
        const V d = (V::load(rows[k].sum + i, lanes) - V::broadcast(rows[k].mean)).only(lanes);
        g_sums[k] = g_sums[k] + g;
        gd_sums[k] = fma(g, d, gd_sums[k]);
        d_sums[k] = d_sums[k] + d;
      });
    });
    unrolled<kRowsPerGroup>([&](auto k) RESNORM_INLINE_LAMBDA {
      g_totals[k] += g_sums[k].sum();
      gd_totals[k] += gd_sums[k].sum();
      d_totals[k] += d_sums[k].sum();
    });
  });
  const double reciprocal_cols = 1.0 / static_cast<double>(cols);
  for (int k = 0; k < kRowsPerGroup; ++k) {
    const double g_mean = g_totals[k] * reciprocal_cols, gd_mean = gd_totals[k] * reciprocal_cols;
    const double delta = d_totals[k] * reciprocal_cols, rstd = rows[k].rstd;
    const double gx_mean = (gd_mean - delta * g_mean) * rstd;
    rows[k].delta = static_cast<Acc>(delta);
    rows[k].scale = static_cast<Acc>(-gx_mean * rstd * rstd);
    rows[k].offset = static_cast<Acc>(-g_mean * rstd);
  }
}

template <bool kHasGradSum, bool kHasBranch, class G, class S, class Acc>
RESNORM_INLINE void norm_backward_apply(const NormBackwardGroup<G, S>& rows, std::int64_t cols, const Acc* weight,
                                        const DropoutRows& dropout, bool far, Acc* const (&sums)[kNormColumnSums]) {
  using V = Vec<Acc>;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    if (far) {
      for (const auto& row : rows) {
        prefetch(row.next_grad_output + i);
        prefetch(row.next_sum + i);
        prefetch(row.next_grad_residual + i);
        if constexpr (kHasGradSum) prefetch(row.next_grad_sum + i);
        if constexpr (kHasBranch) prefetch(row.next_grad_input + i);
      }
    }
    const V w = V::load(weight + i, lanes);
    // The group's rows are summed before they join the running sums: fewer roundings of the large numbers.
    V weight_sum = {}, bias_sum = {}, input_bias_sum = {};
    unrolled<kRowsPerGroup>([&](auto k) RESNORM_INLINE_LAMBDA {
      const auto& row = rows[k];
      const V d = V::load(row.sum + i, lanes) - V::broadcast(row.mean) - V::broadcast(row.delta);
      const V grad_output = V::load(row.grad_output + i, lanes), scaled = grad_output * V::broadcast(row.rstd);
      weight_sum = k == 0 ? scaled * d : fma(scaled, d, weight_sum);
      bias_sum = k == 0 ? grad_output : bias_sum + grad_output;
      V grad = fma(scaled, w, fma(d, V::broadcast(row.scale), V::broadcast(row.offset)));
      if constexpr (kHasGradSum) grad = grad + V::load(row.grad_sum + i, lanes);
      grad.store(row.grad_residual + i, lanes);
      if constexpr (kHasBranch) {
        const V scale = V::broadcast(static_cast<Acc>(dropout.scale));
        const V branch = (grad * scale).keep(row.draws + i, dropout.threshold);
        branch.store(row.grad_input + i, lanes);
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

// One task's operands.
template <class G, class S>
class NormBackwardRows {
 public:
  using Acc = Accumulation<G, S>;

  NormBackwardRows(const AddLayerNormBackward& a, const Dropout& dropout, RowBuffers& buffers)
      : dropout(dropout, a.cols, buffers, kRowsPerGroup),
        grad_output_(a.grad_output, a.cols, buffers, kRowsPerGroup),
        sum_(a.sum, a.cols, buffers, kRowsPerGroup),
        grad_sum_(a.grad_sum, a.cols, buffers, kRowsPerGroup),
        grad_residual_(a.grad_residual, a.cols, buffers, kRowsPerGroup),
        grad_input_(a.grad_input, a.cols, buffers, kRowsPerGroup),
        mean_(static_cast<const Acc*>(a.mean)),
        rstd_(static_cast<const Acc*>(a.rstd)),
        zeros_(buffers.take<Acc>(a.cols)),
        discard_(buffers.take<Acc>(a.cols)) {
    fill(zeros_, a.cols, Acc(0));
  }

  // The group that begins at `row`. Rows from `last` on are filled up with zeros, which add nothing to any sum.
  void read(std::int64_t row, std::int64_t last, NormBackwardGroup<G, S>& rows) const {
    for (int k = 0; k < kRowsPerGroup; ++k) {
      rows[k] = row + k < last ? present(row + k, k, last) : absent();
    }
  }

  void commit(std::int64_t row, std::int64_t last) const {
    for (int k = 0; k < kRowsPerGroup && row + k < last; ++k) {
      grad_residual_.commit(row + k, k);
      grad_input_.commit(row + k, k);
    }
  }

  const DropoutRows dropout;

 private:
  NormBackwardRow<G, S> present(std::int64_t row, int slot, std::int64_t last) const {
    const std::int64_t next = row + kRowsPerGroup < last ? row + kRowsPerGroup : row;
    return {.grad_output = grad_output_.row(row, slot),
            .sum = sum_.row(row, slot),
            .grad_sum = grad_sum_.row(row, slot),
            .grad_residual = grad_residual_.row(row, slot),
            .grad_input = grad_input_.row(row, slot),
            .draws = dropout.row(row, slot),
            .mean = mean_[row],
            .rstd = rstd_[row],
            .delta = 0,
            .scale = 0,
            .offset = 0,
            .next_grad_output = grad_output_.ahead(next),
            .next_grad_input = grad_input_.ahead(next),
            .next_sum = sum_.ahead(next),
            .next_grad_sum = grad_sum_.ahead(next),
            .next_grad_residual = grad_residual_.ahead(next)};
  }

  // Zero is all bits zero in every element type.
  NormBackwardRow<G, S> absent() const {
    const auto* no_grad = reinterpret_cast<const G*>(zeros_);
    const auto* no_sum = reinterpret_cast<const S*>(zeros_);
    return {.grad_output = no_grad,
            .sum = no_sum,
            .grad_sum = no_sum,
            .grad_residual = reinterpret_cast<S*>(discard_),
            .grad_input = reinterpret_cast<G*>(discard_),
            .draws = dropout.any(),
            .mean = 0,
            .rstd = 0,
            .delta = 0,
            .scale = 0,
            .offset = 0,
            .next_grad_output = no_grad,
            .next_grad_input = no_grad,
            .next_sum = no_sum,
            .next_grad_sum = no_sum,
            .next_grad_residual = no_sum};
  }

  RowReader<G> grad_output_;
  RowReader<S> sum_, grad_sum_;
  RowWriter<S> grad_residual_;
  RowWriter<G> grad_input_;
  const Acc *mean_, *rstd_;
  Acc *zeros_, *discard_;
};

// All blocks of rows, for one pair of types. kHasBranch: a gradient behind the dropout is wanted.
template <class G, class S, bool kHasGradSum, bool kHasBranch>
void norm_backward_as(const AddLayerNormBackward& a, ParallelFor parallel_for) {
  using Acc = Accumulation<G, S>;
  const ColumnSums<Acc, kNormColumnSums> column_sums({a.grad_weight, a.grad_bias, a.grad_input_bias}, a.rows, a.cols,
                                                     a.workspace);
  const bool far = are_far<G, S, S>(a.rows, a.cols);
  parallel(parallel_for, column_sums.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const NormBackwardRows<G, S> operands(a, kHasBranch ? a.dropout : Dropout{}, buffers);
    const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
    Acc* const sums[kNormColumnSums] = {buffers.take<Acc>(a.cols), buffers.take<Acc>(a.cols),
                                        buffers.take<Acc>(a.cols)};
    NormBackwardGroup<G, S> rows;
    const auto batch = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; row += kRowsPerGroup) {
        operands.read(row, last, rows);
        norm_backward_sums<G, S>(rows, a.cols, weight);
        norm_backward_apply<kHasGradSum, kHasBranch, G, S>(rows, a.cols, weight, operands.dropout, far, sums);
        operands.commit(row, last);
      }
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
  auto* run = any_float64(a.grad_output, a.sum) ? norm_backward_with<double, double> : norm_backward_with<float, float>;
  if constexpr (kHasHalfLoops) {
    const auto add_half = [&](auto tag) {
      using Half = typename decltype(tag)::Type;
      if (!all_are<Half>(a.grad_output, a.grad_input)) return;
      if (all_are<float>(a.sum, a.grad_sum, a.grad_residual)) run = norm_backward_with<Half, float>;
      if (all_are<Half>(a.sum, a.grad_sum, a.grad_residual)) run = norm_backward_with<Half, Half>;
    };
    add_half(Tag<BFloat16>{});
    add_half(Tag<Float16>{});
  }
  run(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
