// SPDX-License-Identifier: BSD-3-Clause
// The kernels compute in float32; float64 goes to torch's own operators, in contiguous tensors, because in others their
// last bits are different.
#include <torch/library.h>

#include "../bias_activation.h"
#include "../bias_activation_composite.h"
#include "../support/operands.h"
#include "../support/overlap.h"
#include "cpu_kernels.h"

namespace resnorm {

namespace {

void run_forward(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                 const OptionalTensor& seed, Rows output) {
  const auto counts = row_counts(input, row_dims_of(input));
  const RowView input_rows(input, row_dims_of(input));
  const VectorView bias_view(bias);
  CpuKernels::run(BiasActivationForward{.rows = counts.rows,
                                        .cols = counts.cols,
                                        .input = input_rows.const_rows(),
                                        .bias = bias_view.const_vector(),
                                        .activation = parse_activation(activation),
                                        .dropout = CpuKernels::dropout(dropout_p, seed),
                                        .output = output});
}

Tensor bias_activation_cpu(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                           double dropout_p, const OptionalTensor& seed) {
  if (input.scalar_type() == at::kDouble)
    return composite::BiasActivation::kernel(input.contiguous(), bias, activation, dropout_p, seed);
  auto output = bias_activation_meta(input, bias, activation, dropout_p, seed);
  if (output.numel() == 0) return output;
  run_forward(input, bias, activation, dropout_p, seed, result_rows(output, row_dims_of(output), true));
  return output;
}

void bias_activation_out_cpu(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                             double dropout_p, const OptionalTensor& seed, Tensor output) {
  bias_activation_out_meta(input, bias, activation, dropout_p, seed, output);
  check_overlap(output, {input}, {bias, seed});
  if (input.scalar_type() == at::kDouble) {
    output.copy_(composite::bias_activation(input.contiguous(), bias, activation, dropout_p, seed));
    return;
  }
  if (output.numel() == 0) return;
  OutputRows output_rows(output, row_dims_of(output));
  run_forward(input, bias, activation, dropout_p, seed, output_rows.rows());
  output_rows.commit();
}

std::tuple<Tensor, Tensor, Tensor> bias_activation_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                                const OptionalTensor& bias, c10::string_view activation,
                                                                double dropout_p, const OptionalTensor& seed,
                                                                std::array<bool, 3> output_mask) {
  if (input.scalar_type() == at::kDouble) {
    return composite::BiasActivationBackward::kernel(grad_output.contiguous(), input.contiguous(), bias, activation,
                                                     dropout_p, seed, output_mask);
  }
  auto results = bias_activation_backward_meta(grad_output, input, bias, activation, dropout_p, seed, output_mask);
  const auto& [grad_input, grad_bias, output] = results;
  const auto row_dims = row_dims_of(input);
  const auto counts = row_counts(input, row_dims);
  if (counts.cols == 0) return results;  // all of them empty; the kernels take rows of at least one element
  const RowView grad_output_rows(grad_output, row_dims), input_rows(input, row_dims);
  const VectorView bias_view(bias);
  CpuKernels::run(BiasActivationBackward{.rows = counts.rows,
                                         .cols = counts.cols,
                                         .grad_output = grad_output_rows.const_rows(),
                                         .input = input_rows.const_rows(),
                                         .bias = bias_view.const_vector(),
                                         .activation = parse_activation(activation),
                                         .dropout = CpuKernels::dropout(dropout_p, seed),
                                         .grad_input = result_rows(grad_input, row_dims, output_mask[0]),
                                         .grad_bias = result_vector(grad_bias, output_mask[1]),
                                         .output = result_rows(output, row_dims, output_mask[2])});
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) {
  m.impl("bias_activation", bias_activation_cpu);
  m.impl("bias_activation_out", bias_activation_out_cpu);
  m.impl("_bias_activation_backward", bias_activation_backward_cpu);
}

}  // namespace resnorm
