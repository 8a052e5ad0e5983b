// SPDX-License-Identifier: BSD-3-Clause
#include "../residual_add.h"

#include <torch/library.h>

#include "../overlap.h"
#include "kernel_call.h"

namespace resnorm {

namespace {

void run_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                 const OptionalTensor& seed, Rows output) {
  const auto row_dims = row_dims_of(input);
  const auto counts = row_counts(input, row_dims);
  const RowView input_rows(input, row_dims), residual_rows(residual, row_dims);
  const VectorView input_bias_view(input_bias);
  cpu_kernels().residual_add_forward({.rows = counts.rows,
                                      .cols = counts.cols,
                                      .input = input_rows.const_rows(),
                                      .residual = residual_rows.const_rows(),
                                      .input_bias = input_bias_view.const_vector(),
                                      .dropout = kernel_dropout(dropout_p, seed),
                                      .output = output},
                                     parallel_for);
}

Tensor residual_add_cpu(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                        const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  auto output = residual_add_meta(input, residual, input_bias, dropout_p, seed, residual_dtype);
  if (output.numel() == 0) return output;
  const auto cols = row_counts(output, row_dims_of(output)).cols;
  run_forward(input, residual, input_bias, dropout_p, seed, result_rows(output, cols, true));
  return output;
}

void residual_add_out_cpu(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                          double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                          Tensor output) {
  residual_add_out_meta(input, residual, input_bias, dropout_p, seed, residual_dtype, output);
  check_overlap(output, {input, residual}, {input_bias, seed});
  if (output.numel() == 0) return;
  OutputRows output_rows(output, row_dims_of(output));
  run_forward(input, residual, input_bias, dropout_p, seed, output_rows.rows());
  output_rows.commit();
}

std::tuple<Tensor, Tensor> residual_add_backward_cpu(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                     double dropout_p, const OptionalTensor& seed,
                                                     at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  auto results = residual_add_backward_meta(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
  const auto& [grad_input, grad_input_bias] = results;
  const auto row_dims = input_bias.has_value() ? input_bias->dim() : row_dims_of(grad_output);
  const auto counts = row_counts(grad_output, row_dims);
  if (counts.cols == 0) return results;  // all of them empty; the kernels take rows of at least one element
  const RowView grad_output_rows(grad_output, row_dims);
  const auto workspace =
      backward_workspace(counts, output_mask[1], accumulation_dtype({grad_output.scalar_type(), input_dtype}));
  cpu_kernels().residual_add_backward({.rows = counts.rows,
                                       .cols = counts.cols,
                                       .grad_output = grad_output_rows.const_rows(),
                                       .dropout = kernel_dropout(dropout_p, seed),
                                       .grad_input = result_rows(grad_input, counts.cols, output_mask[0]),
                                       .grad_input_bias = result_vector(grad_input_bias, output_mask[1]),
                                       .workspace = workspace.mutable_data_ptr()},
                                      parallel_for);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) {
  m.impl("residual_add", residual_add_cpu);
  m.impl("residual_add_out", residual_add_out_cpu);
  m.impl("_residual_add_backward", residual_add_backward_cpu);
}

}  // namespace resnorm
