// SPDX-License-Identifier: BSD-3-Clause
// residual_add by a device's kernels, from tensors to operands. Kernels is CpuKernels or CudaKernels.
#pragma once

#include <torch/library.h>

#include "residual_add.h"
#include "support/operands.h"
#include "support/overlap.h"

namespace resnorm {

template <class Kernels>
class ResidualAddOn {
 public:
  static void implement(torch::Library& m) {
    m.impl("residual_add", run);
    m.impl("residual_add_out", out);
    m.impl("_residual_add_backward", run_backward);
  }

  // Without the dispatcher; also for callers that know that no key of it has anything to do.
  static void out(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                  const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype, Tensor output) {
    residual_add_out_meta(input, residual, input_bias, dropout_p, seed, residual_dtype, output);
    check_overlap(output, {input, residual}, {input_bias, seed});
    if (output.numel() == 0) return;
    OutputRows output_rows(output, row_dims_of(output));
    launch(input, residual, input_bias, dropout_p, seed, output_rows.rows());
    output_rows.commit();
  }

 private:
  static void launch(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                     const OptionalTensor& seed, Rows output) {
    Kernels kernels("residual_add", input);
    const auto row_dims = row_dims_of(input);
    const auto counts = row_counts(input, row_dims);
    const RowView input_rows(input, row_dims), residual_rows(residual, row_dims);
    const VectorView input_bias_view(input_bias);
    const auto dropout = kernels.dropout(dropout_p, seed);
    kernels.run(ResidualAddForward{.rows = counts.rows,
                                   .cols = counts.cols,
                                   .input = input_rows.const_rows(),
                                   .residual = residual_rows.const_rows(),
                                   .input_bias = input_bias_view.const_vector(),
                                   .dropout = dropout,
                                   .output = output});
  }

  static Tensor run(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
    auto output = residual_add_meta(input, residual, input_bias, dropout_p, seed, residual_dtype);
    if (output.numel() == 0) return output;
    launch(input, residual, input_bias, dropout_p, seed, result_rows(output, row_dims_of(output), true));
    return output;
  }

  static std::tuple<Tensor, Tensor> run_backward(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                 double dropout_p, const OptionalTensor& seed,
                                                 at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
    auto results = residual_add_backward_meta(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
    const auto& [grad_input, grad_input_bias] = results;
    const auto row_dims = input_bias.has_value() ? input_bias->dim() : row_dims_of(grad_output);
    const auto counts = row_counts(grad_output, row_dims);
    // All results are empty; the kernels take rows of at least one element, and no rows only where they sum them.
    if (counts.cols == 0 || (counts.rows == 0 && !output_mask[1])) return results;
    Kernels kernels("the backward pass of residual_add", grad_output);
    const RowView grad_output_rows(grad_output, row_dims);
    const auto dropout = kernels.dropout(dropout_p, seed);
    kernels.run(ResidualAddBackward{.rows = counts.rows,
                                    .cols = counts.cols,
                                    .grad_output = grad_output_rows.const_rows(),
                                    .dropout = dropout,
                                    .grad_input = result_rows(grad_input, row_dims, output_mask[0]),
                                    .grad_input_bias = result_vector(grad_input_bias, output_mask[1])});
    return results;
  }
};

}  // namespace resnorm
