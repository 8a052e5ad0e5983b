// SPDX-License-Identifier: BSD-3-Clause
// The norms by a device's kernels, from tensors to operands. Kernels is CpuKernels or CudaKernels.
#pragma once

#include "norm.h"
#include "norm_operators.h"
#include "support/operands.h"

namespace resnorm {

template <class Kernels>
class NormsOn {
 public:
  static void implement(torch::Library& m) { implement_norms<forward, backward, out>(m); }

  // Without the dispatcher; also for callers that know that no key of it has anything to do.
  static void out(const NormCall& call, const Tensor& output, const OptionalTensor& sum) {
    norm_out_meta(call, output, sum);
    check_norm_overlap(call, output, sum);
    if (output.numel() == 0) return;
    const auto row_dims = static_cast<int64_t>(call.normalized_shape.size());
    OutputRows output_rows(output, row_dims);
    std::optional<OutputRows> sum_rows;
    if (sum.has_value()) sum_rows.emplace(*sum, row_dims);
    launch(call, output_rows.rows(), sum_rows.has_value() ? sum_rows->rows() : Rows{});
    output_rows.commit();
    if (sum_rows.has_value()) sum_rows->commit();
  }

 private:
  static void launch(const NormCall& call, Rows output, Rows sum, const Tensor& mean = {}, const Tensor& rstd = {}) {
    Kernels kernels(norm_name(call.residual.has_value(), call.centered), call.input);
    const auto row_dims = static_cast<int64_t>(call.normalized_shape.size());
    const auto counts = row_counts(call.input, row_dims);
    const RowView input(call.input, row_dims);
    std::optional<RowView> residual;
    if (call.residual.has_value()) {
      residual.emplace(*call.residual, row_dims);
      sum.dtype = kernel_dtype(norm_sum_dtype(call));  // counts where the sum is not stored too
    }
    const VectorView input_bias(call.input_bias), weight(call.weight), bias(call.bias);
    kernels.run(NormForward{.rows = counts.rows,
                            .cols = counts.cols,
                            .centered = call.centered,
                            .input = input.const_rows(),
                            .residual = residual.has_value() ? residual->const_rows() : ConstRows{},
                            .input_bias = input_bias.const_vector(),
                            .weight = weight.const_vector(),
                            .bias = bias.const_vector(),
                            .dropout = kernels.dropout(call.dropout_p, call.seed),
                            .eps = call.eps,
                            .output = output,
                            .sum = sum,
                            .mean = mean.defined() ? mean.mutable_data_ptr() : nullptr,
                            .rstd = rstd.defined() ? rstd.mutable_data_ptr() : nullptr});
  }

  static NormResults forward(const NormCall& call) {
    auto results = norm_forward_meta(call);
    if (results.output.numel() == 0) return results;
    const auto row_dims = static_cast<int64_t>(call.normalized_shape.size());
    launch(call, result_rows(results.output, row_dims, true), result_rows(results.sum, row_dims, results.sum.defined()),
           results.mean, results.rstd);
    return results;
  }

  static NormGradients backward(const NormBackwardCall& call) {
    auto results = norm_backward_meta(call);
    const auto& [grad_input, grad_residual, grad_input_bias, grad_weight, grad_bias] = results;
    const auto row_dims = static_cast<int64_t>(call.normalized_shape.size());
    const auto counts = row_counts(call.sum, row_dims);
    if (counts.cols == 0) return results;  // all of them empty; the kernels take rows of at least one element
    Kernels kernels("the backward pass of a norm", call.sum);
    const RowView grad_output(call.grad_output, row_dims), sum(call.sum, row_dims);
    std::optional<RowView> grad_sum;
    if (call.grad_sum.has_value()) grad_sum.emplace(*call.grad_sum, row_dims);
    const VectorView weight(call.weight), mean(call.mean), rstd(call.rstd);
    const auto& wanted = call.output_mask;
    kernels.run(NormBackward{.rows = counts.rows,
                             .cols = counts.cols,
                             .centered = call.centered,
                             .grad_output = grad_output.const_rows(),
                             .grad_sum = grad_sum.has_value() ? grad_sum->const_rows() : ConstRows{},
                             .sum = sum.const_rows(),
                             .weight = weight.const_vector(),
                             .mean = mean.const_vector().data,
                             .rstd = rstd.const_vector().data,
                             .dropout = kernels.dropout(call.dropout_p, call.seed),
                             .grad_input = result_rows(grad_input, row_dims, wanted[0]),
                             .grad_residual = result_rows(grad_residual, row_dims, wanted[1]),
                             .grad_weight = result_vector(grad_weight, wanted[3]),
                             .grad_bias = result_vector(grad_bias, wanted[4]),
                             .grad_input_bias = result_vector(grad_input_bias, wanted[2])});
    return results;
  }
};

}  // namespace resnorm
