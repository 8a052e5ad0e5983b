// SPDX-License-Identifier: BSD-3-Clause
#include "../residual_add.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/residual_add.h"
#include "../overlap.h"
#include "launch.h"

namespace resnorm {

namespace {

void run_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                 const OptionalTensor& seed, Rows output) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto row_dims = row_dims_of(input);
  const auto counts = row_counts(input, row_dims);
  const RowView input_rows(input, row_dims), residual_rows(residual, row_dims);
  const VectorView input_bias_view(input_bias);
  const ResidualAddForward arguments = {.rows = counts.rows,
                                        .cols = counts.cols,
                                        .input = input_rows.const_rows(),
                                        .residual = residual_rows.const_rows(),
                                        .input_bias = input_bias_view.const_vector(),
                                        .dropout = dropout_of(dropout_p),
                                        .output = output};
  const auto plan = cuda::residual_add_forward_plan(arguments);
  const auto error = cuda::residual_add_forward(arguments, plan, seed_address(arguments.dropout, seed),
                                                c10::cuda::getCurrentCUDAStream());
  check_launch(error, "residual_add", counts, plan);
}

Tensor residual_add_cuda(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                         double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  auto output = residual_add_meta(input, residual, input_bias, dropout_p, seed, residual_dtype);
  if (output.numel() == 0) return output;
  const auto cols = row_counts(output, row_dims_of(output)).cols;
  run_forward(input, residual, input_bias, dropout_p, seed, result_rows(output, cols, true));
  return output;
}

void residual_add_out_cuda(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                           double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                           Tensor output) {
  residual_add_out_meta(input, residual, input_bias, dropout_p, seed, residual_dtype, output);
  check_overlap(output, {input, residual}, {input_bias, seed});
  if (output.numel() == 0) return;
  OutputRows output_rows(output, row_dims_of(output));
  run_forward(input, residual, input_bias, dropout_p, seed, output_rows.rows());
  output_rows.commit();
}

std::tuple<Tensor, Tensor> residual_add_backward_cuda(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                      double dropout_p, const OptionalTensor& seed,
                                                      at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  auto results = residual_add_backward_meta(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
  const auto& [grad_input, grad_input_bias] = results;
  const auto row_dims = input_bias.has_value() ? input_bias->dim() : row_dims_of(grad_output);
  const auto counts = row_counts(grad_output, row_dims);
  if (counts.cols == 0 || (counts.rows == 0 && !output_mask[1])) return results;  // all of them empty
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const RowView grad_output_rows(grad_output, row_dims);
  ResidualAddBackward arguments = {.rows = counts.rows,
                                   .cols = counts.cols,
                                   .grad_output = grad_output_rows.const_rows(),
                                   .dropout = dropout_of(dropout_p),
                                   .grad_input = result_rows(grad_input, counts.cols, output_mask[0]),
                                   .grad_input_bias = result_vector(grad_input_bias, output_mask[1])};
  const auto plan = cuda::residual_add_backward_plan(arguments, current_device());
  const auto workspace = device_workspace(cuda::residual_add_backward_workspace_bytes(arguments, plan), grad_output);
  arguments.workspace = workspace.mutable_data_ptr();
  const auto error = cuda::residual_add_backward(arguments, plan, seed_address(arguments.dropout, seed),
                                                 c10::cuda::getCurrentCUDAStream());
  check_launch(error, "the backward pass of residual_add", counts, plan);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) {
  m.impl("residual_add", residual_add_cuda);
  m.impl("residual_add_out", residual_add_out_cuda);
  m.impl("_residual_add_backward", residual_add_backward_cuda);
}

}  // namespace resnorm
