// SPDX-License-Identifier: BSD-3-Clause
// The norms, backward; without a residual there is no dropout and no grad_sum.
//
// With x = (s - mean) * rstd and g = grad_output * weight, the gradient of a row's sum is
//   grad_sum + rstd * (g - sum(g) / N - x * sum(g x) / N)
// and grad_weight = sum over rows of grad_output x, grad_bias = sum over rows of grad_output. With d = s - mean, the
// first sweep over a row sums g, g d and d, which gives delta, the distance of the row's mean from `mean`: what float32
// does not hold of it and, where the sum was rounded to be stored, what that rounding did to it. Where a norm is not
// centered, d = s, delta = 0, and sum(g) and grad_bias fall away. The second sweep, from the first cache, writes
// everything. Rows go by groups: weight and column sums are loaded and stored once for all.
#pragma once

#include <cstdint>

#include "column_sums.h"
#include "dropout.h"
#include "loops.h"
#include "parallel.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// G is the type of grad_output and grad_input, S that of sum, grad_sum and grad_residual.
template <class G, class S, int kRows>
struct NormBackwardGroup {
  using Acc = Accumulation<G, S>;

  const G* grad_output[kRows];
  const S *sum[kRows], *grad_sum[kRows];
  S* grad_residual[kRows];
  G* grad_input[kRows];
  const std::uint16_t* draws[kRows];
  Acc mean[kRows], rstd[kRows];
  std::int64_t to_next_grad_output, to_next_sum;  // distances: as many pointers more would not fit the registers
};

// From the first sweep: d = s - mean - delta; grad_residual = grad_sum + g * rstd + d * scale + offset.
template <class Acc>
struct NormBackwardTerms {
  Acc delta, scale, offset;
};

template <bool kCentered, class G, class S, int kRows, class Acc>
RESNORM_INLINE void norm_backward_sums(const NormBackwardGroup<G, S, kRows>& rows, std::int64_t cols, const Acc* weight,
                                       NormBackwardTerms<Acc> (&terms)[kRows]) {
  using V = Vec<Acc>;
  constexpr int kSlots = 2;
  double g_totals[kRows] = {}, gd_totals[kRows] = {}, d_totals[kRows] = {};
  for_each_piece<Acc, kSlots>(cols, [&](std::int64_t begin, std::int64_t size) RESNORM_INLINE_LAMBDA {
    V g_sums[kRows][kSlots] = {}, gd_sums[kRows][kSlots] = {}, d_sums[kRows][kSlots] = {};
    for_each_vector<Acc, kSlots>(size, [&](std::int64_t piece_i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      const std::int64_t i = begin + piece_i;
      const V w = V::load(weight + i, lanes);
      unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
        const V g = V::load(rows.grad_output[k] + i, lanes) * w;
        const V s = V::load(rows.sum[k] + i, lanes);
        if constexpr (kCentered) {
          const V d = (s - V::broadcast(rows.mean[k])).only(lanes);
          g_sums[k][slot] = g_sums[k][slot] + g;
          gd_sums[k][slot] = fma(g, d, gd_sums[k][slot]);
          d_sums[k][slot] = d_sums[k][slot] + d;
        } else {
          gd_sums[k][slot] = fma(g, s.only(lanes), gd_sums[k][slot]);
        }
      });
    });
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      gd_totals[k] += total(gd_sums[k]);
      if constexpr (kCentered) {
        g_totals[k] += total(g_sums[k]);
        d_totals[k] += total(d_sums[k]);
      }
    });
  });
  const double reciprocal_cols = 1.0 / static_cast<double>(cols);
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    const double g_mean = g_totals[k] * reciprocal_cols, gd_mean = gd_totals[k] * reciprocal_cols;
    const double delta = d_totals[k] * reciprocal_cols, rstd = rows.rstd[k];
    terms[k] = {static_cast<Acc>(delta), static_cast<Acc>((delta * g_mean - gd_mean) * rstd * rstd * rstd),
                static_cast<Acc>(-g_mean * rstd)};
  });
}

template <bool kCentered, bool kHasGradSum, bool kHasBranch, bool kNonTemporal, class G, class S, int kRows, class Acc,
          int kSums>
RESNORM_INLINE void norm_backward_apply(const NormBackwardGroup<G, S, kRows>& group, std::int64_t cols,
                                        const Acc* weight, const NormBackwardTerms<Acc> (&terms)[kRows],
                                        const DropoutRows& dropout, Acc* const (&sums)[kSums]) {
  using V = Vec<Acc>;
  // Copies, because a store through a pointer might change the originals for all that the compiler knows.
  const NormBackwardGroup<G, S, kRows> rows = group;
  V means[kRows], rstds[kRows], deltas[kRows], scales[kRows], offsets[kRows];
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    if constexpr (kCentered) means[k] = V::broadcast(rows.mean[k]);
    rstds[k] = V::broadcast(rows.rstd[k]);
    deltas[k] = V::broadcast(terms[k].delta);
    scales[k] = V::broadcast(terms[k].scale);
    offsets[k] = V::broadcast(terms[k].offset);
  });
  Acc* const weight_sums = sums[0];
  Acc* const bias_sums = kCentered ? sums[1] : nullptr;
  Acc* const input_bias_sums = kHasBranch ? sums[kSums - 1] : nullptr;
  const V dropout_scale = V::broadcast(static_cast<Acc>(dropout.scale));
  const std::uint32_t threshold = dropout.threshold;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      prefetch(rows.grad_output[k] + rows.to_next_grad_output + i);
      prefetch(rows.sum[k] + rows.to_next_sum + i);
    });
    const V w = V::load(weight + i, lanes);
    // The group's rows are summed before they join the running sums: fewer roundings of the large numbers.
    V weight_sum = {}, bias_sum = {}, input_bias_sum = {}, grads[kRows], branches[kRows];
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V s = V::load(rows.sum[k] + i, lanes), d = kCentered ? s - means[k] - deltas[k] : s;
      const V grad_output = V::load(rows.grad_output[k] + i, lanes), scaled = grad_output * rstds[k];
      weight_sum = k == 0 ? scaled * d : fma(scaled, d, weight_sum);
      if constexpr (kCentered) bias_sum = k == 0 ? grad_output : bias_sum + grad_output;
      grads[k] = fma(scaled, w, kCentered ? fma(d, scales[k], offsets[k]) : d * scales[k]);
      if constexpr (kHasGradSum) grads[k] = grads[k] + V::load(rows.grad_sum[k] + i, lanes);
      if constexpr (kHasBranch) {
        branches[k] = (grads[k] * dropout_scale).keep(rows.draws[k] + i, threshold);
        input_bias_sum = k == 0 ? branches[k] : input_bias_sum + branches[k];
      }
    });
    put_rows<kNonTemporal>(grads, rows.grad_residual, i, lanes);
    if constexpr (kHasBranch) put_rows<kNonTemporal>(branches, rows.grad_input, i, lanes);
    const auto add = [&](Acc* running, V sum)
                         RESNORM_INLINE_LAMBDA { (V::load(running + i, lanes) + sum).store(running + i, lanes); };
    add(weight_sums, weight_sum);
    if constexpr (kCentered) add(bias_sums, bias_sum);
    if constexpr (kHasBranch) add(input_bias_sums, input_bias_sum);
  });
}

// One task's operands.
template <class G, class S>
class NormBackwardRows {
 public:
  using Acc = Accumulation<G, S>;

  NormBackwardRows(const NormBackward& a, const Dropout& dropout, RowBuffers& buffers)
      : dropout(dropout, a.cols, buffers, kRowsPerGroup),
        grad_residual(a.grad_residual, a.cols, buffers, kRowsPerGroup),
        grad_input(a.grad_input, a.cols, buffers, kRowsPerGroup),
        grad_output_(a.grad_output, a.cols, buffers, kRowsPerGroup),
        sum_(a.sum, a.cols, buffers, kRowsPerGroup),
        grad_sum_(a.grad_sum, a.cols, buffers, kRowsPerGroup),
        mean_(static_cast<const Acc*>(a.mean)),
        rstd_(static_cast<const Acc*>(a.rstd)) {}

  template <int kRows>
  RESNORM_INLINE NormBackwardGroup<G, S, kRows> group(std::int64_t first) const {
    NormBackwardGroup<G, S, kRows> rows;
    rows.to_next_grad_output = grad_output_.distance_to_next(kRows);
    rows.to_next_sum = sum_.distance_to_next(kRows);
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const std::int64_t row = first + k;
      rows.grad_output[k] = grad_output_.row(row, k);
      rows.sum[k] = sum_.row(row, k);
      rows.grad_sum[k] = grad_sum_.row(row, k);
      rows.grad_residual[k] = grad_residual.row(row, k);
      rows.grad_input[k] = grad_input.row(row, k);
      rows.draws[k] = dropout.row(row, k);
      if (mean_ != nullptr) rows.mean[k] = mean_[row];
      rows.rstd[k] = rstd_[row];
    });
    return rows;
  }

  const DropoutRows dropout;
  const RowWriter<S> grad_residual;
  const RowWriter<G> grad_input;

 private:
  RowReader<G> grad_output_;
  RowReader<S> sum_, grad_sum_;
  const Acc *mean_, *rstd_;
};

// All blocks of rows, for one pair of types.
template <bool kCentered, class G, class S>
void norm_backward_of(NormBackward a, ParallelFor parallel_for) {
  using Acc = Accumulation<G, S>;
  // Whether a gradient behind the dropout is wanted, grad_input or grad_input_bias, beside that of the sum,
  // grad_residual. Where nothing lies between the sum and the input, they have one gradient.
  const bool has_branch =
      a.grad_input_bias.data != nullptr ||
      (a.grad_input.data != nullptr &&
       (a.grad_residual.data != nullptr || a.dropout.threshold > 0 || a.grad_input.dtype != a.sum.dtype));
  if (!has_branch && a.grad_input.data != nullptr) a.grad_residual = a.grad_input, a.grad_input = {};
  const bool has_grad_sum = a.grad_sum.data != nullptr;
  constexpr int kSums = kCentered ? 3 : 2;
  const Vector gradients[] = {a.grad_weight, kCentered ? a.grad_bias : a.grad_input_bias, a.grad_input_bias};
  const ColumnSums<Acc, kSums> column_sums(gradients, a.rows, a.cols, a.workspace);
  parallel(parallel_for, column_sums.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const NormBackwardRows<G, S> operands(a, has_branch ? a.dropout : Dropout{}, buffers);
    const int matrices = 3 + has_grad_sum + has_branch;
    const bool bypass = operands.grad_residual.may_bypass_caches(a.rows, matrices) &&
                        (!has_branch || operands.grad_input.may_bypass_caches(a.rows, matrices));
    const Acc* weight = vector_or(a.weight, Acc(1), a.cols, buffers);
    Acc* scratch[kSums];
    for (Acc*& sum : scratch) sum = buffers.take<Acc>(a.cols);
    const auto batch = [&](std::int64_t batch_begin, std::int64_t batch_end, Acc* const(&sums)[kSums]) {
      for_each_group<Acc>(batch_begin, batch_end, [&](std::int64_t first, auto count) RESNORM_INLINE_LAMBDA {
        const auto group = operands.template group<count>(first);
        NormBackwardTerms<Acc> terms[count];
        norm_backward_sums<kCentered>(group, a.cols, weight, terms);
        const auto apply = [&](auto kHasGradSum, auto kHasBranch, auto kNonTemporal) RESNORM_INLINE_LAMBDA {
          norm_backward_apply<kCentered, kHasGradSum, kHasBranch, kNonTemporal>(group, a.cols, weight, terms,
                                                                                operands.dropout, sums);
        };
        if constexpr (count == 1) {
          // Single rows are few, or rare where they are doubles: one loop does everything, and what is absent of it is
          // read as -0 or goes nowhere.
          apply(Index<1>{}, Index<1>{}, Index<0>{});
        } else {
          with_flag(has_grad_sum, [&](auto kHasGradSum) RESNORM_INLINE_LAMBDA {
            with_flag(has_branch, [&](auto kHasBranch) RESNORM_INLINE_LAMBDA {
              with_flag(bypass,
                        [&](auto kNonTemporal) RESNORM_INLINE_LAMBDA { apply(kHasGradSum, kHasBranch, kNonTemporal); });
            });
          });
        }
        for (int k = 0; k < count; ++k) {
          operands.grad_residual.commit(first + k, k);
          operands.grad_input.commit(first + k, k);
        }
      });
    };
    for (std::int64_t block = begin; block < end; ++block) column_sums.accumulate(block, a.rows, scratch, batch);
    if (bypass) non_temporal_fence();
  });
  column_sums.finish(parallel_for);
}

template <class G, class S>
void norm_backward_as(const NormBackward& a, ParallelFor parallel_for) {
  a.centered ? norm_backward_of<true, G, S>(a, parallel_for) : norm_backward_of<false, G, S>(a, parallel_for);
}

inline void norm_backward(const NormBackward& a, ParallelFor parallel_for) {
  void (*run)(const NormBackward&, ParallelFor) = base::norm_backward_kernels.norm_backward;
  if constexpr (kHasLoops<float>) {
    run = any_float64(a.grad_output, a.sum) ? norm_backward_as<double, double> : norm_backward_as<float, float>;
  }
  for_each_half([&](auto tag) {
    using Half = typename decltype(tag)::Type;
    if (!all_are<Half>(a.grad_output, a.grad_input)) return;
    if (all_are<float>(a.sum, a.grad_sum, a.grad_residual)) run = norm_backward_as<Half, float>;
    if (all_are<Half>(a.sum, a.grad_sum, a.grad_residual)) run = norm_backward_as<Half, Half>;
  });
  run(a, parallel_for);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
