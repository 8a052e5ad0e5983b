// SPDX-License-Identifier: BSD-3-Clause
#include "../layer_norm.h"

#include <torch/library.h>

#include "../overlap.h"
#include "kernel_call.h"

namespace resnorm {

namespace {

void run_forward(const Tensor& input, int64_t row_dims, const OptionalTensor& weight, const OptionalTensor& bias,
                 double eps, Rows output, void* mean, void* rstd) {
  const auto counts = row_counts(input, row_dims);
  const RowView input_rows(input, row_dims);
  const VectorView weight_view(weight), bias_view(bias);
  cpu_kernels().layer_norm_forward({.rows = counts.rows,
                                    .cols = counts.cols,
                                    .input = input_rows.const_rows(),
                                    .weight = weight_view.const_vector(),
                                    .bias = bias_view.const_vector(),
                                    .eps = eps,
                                    .output = output,
                                    .mean = mean,
                                    .rstd = rstd},
                                   parallel_for);
}

Tensor layer_norm_cpu(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  auto output = layer_norm_meta(input, normalized_shape, weight, bias, eps);
  if (output.numel() == 0) return output;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  run_forward(input, row_dims, weight, bias, eps, result_rows(output, row_counts(output, row_dims).cols, true), nullptr,
              nullptr);
  return output;
}

void layer_norm_out_cpu(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                        const OptionalTensor& bias, double eps, Tensor output) {
  layer_norm_out_meta(input, normalized_shape, weight, bias, eps, output);
  check_overlap(output, {input}, {weight, bias});
  if (output.numel() == 0) return;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  OutputRows output_rows(output, row_dims);
  run_forward(input, row_dims, weight, bias, eps, output_rows.rows(), nullptr, nullptr);
  output_rows.commit();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_cpu(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          double eps) {
  auto results = layer_norm_forward_meta(input, normalized_shape, weight, bias, eps);
  const auto& [output, mean, rstd] = results;
  if (output.numel() == 0) return results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  run_forward(input, row_dims, weight, bias, eps, result_rows(output, row_counts(output, row_dims).cols, true),
              mean.mutable_data_ptr(), rstd.mutable_data_ptr());
  return results;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                           c10::SymIntArrayRef normalized_shape,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& rstd, double eps,
                                                           std::array<bool, 3> output_mask) {
  auto results =
      layer_norm_backward_meta(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps, output_mask);
  const auto& [grad_input, grad_weight, grad_bias] = results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto counts = row_counts(input, row_dims);
  if (counts.cols == 0) return results;  // all of them empty; the kernels take rows of at least one element
  const RowView grad_output_rows(grad_output, row_dims), input_rows(input, row_dims);
  const VectorView weight_view(weight), mean_view(mean), rstd_view(rstd);
  const int column_sums = output_mask[1] + output_mask[2];
  const auto workspace = backward_workspace(counts, column_sums, mean.scalar_type());
  cpu_kernels().layer_norm_backward({.rows = counts.rows,
                                     .cols = counts.cols,
                                     .grad_output = grad_output_rows.const_rows(),
                                     .input = input_rows.const_rows(),
                                     .weight = weight_view.const_vector(),
                                     .mean = mean_view.const_vector().data,
                                     .rstd = rstd_view.const_vector().data,
                                     .grad_input = result_rows(grad_input, counts.cols, output_mask[0]),
                                     .grad_weight = result_vector(grad_weight, output_mask[1]),
                                     .grad_bias = result_vector(grad_bias, output_mask[2]),
                                     .workspace = workspace.mutable_data_ptr()},
                                    parallel_for);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) {
  m.impl("layer_norm", layer_norm_cpu);
  m.impl("layer_norm_out", layer_norm_out_cpu);
  m.impl("_layer_norm_forward", layer_norm_forward_cpu);
  m.impl("_layer_norm_backward", layer_norm_backward_cpu);
}

}  // namespace resnorm
