// SPDX-License-Identifier: BSD-3-Clause
#include "../add_layer_norm.h"

#include <torch/library.h>

#include "../overlap.h"
#include "norm_backward.h"
#include "norm_forward.h"

namespace resnorm {

namespace {

std::tuple<Tensor, Tensor> add_layer_norm_cuda(const Tensor& input, const Tensor& residual,
                                               c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                               const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                               double dropout_p, const OptionalTensor& seed, bool prenorm,
                                               std::optional<at::ScalarType> residual_dtype) {
  auto results = add_layer_norm_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                                     prenorm, residual_dtype);
  const auto& [output, sum] = results;
  if (output.numel() == 0) return results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto cols = row_counts(output, row_dims).cols;
  norm_forward_cuda(
      "add_layer_norm", row_dims, {input, residual, weight, bias, eps, input_bias, dropout_p, seed},
      {.output = result_rows(output, cols, true),
       .sum = prenorm ? result_rows(sum, cols, true) : unstored_rows(sum_dtype(input, residual, residual_dtype))});
  return results;
}

void add_layer_norm_out_cuda(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                             const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                             std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  add_layer_norm_out_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                          residual_dtype, output, sum);
  check_overlap(output, {input, residual}, {weight, bias, input_bias, seed, sum});
  if (sum.has_value()) check_overlap(*sum, {input, residual}, {weight, bias, input_bias, seed});
  if (output.numel() == 0) return;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  OutputRows output_rows(output, row_dims);
  std::optional<OutputRows> sum_rows;
  if (sum.has_value()) sum_rows.emplace(*sum, row_dims);
  norm_forward_cuda(
      "add_layer_norm", row_dims, {input, residual, weight, bias, eps, input_bias, dropout_p, seed},
      {.output = output_rows.rows(),
       .sum = sum_rows.has_value() ? sum_rows->rows() : unstored_rows(sum_dtype(input, residual, residual_dtype))});
  output_rows.commit();
  if (sum_rows.has_value()) sum_rows->commit();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward_cuda(
    const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  auto results = add_layer_norm_forward_meta(input, residual, normalized_shape, weight, bias, eps, input_bias,
                                             dropout_p, seed, residual_dtype);
  const auto& [output, sum, mean, rstd] = results;
  if (output.numel() == 0) return results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto cols = row_counts(output, row_dims).cols;
  norm_forward_cuda("add_layer_norm", row_dims, {input, residual, weight, bias, eps, input_bias, dropout_p, seed},
                    {.output = result_rows(output, cols, true),
                     .sum = result_rows(sum, cols, true),
                     .mean = mean.mutable_data_ptr(),
                     .rstd = rstd.mutable_data_ptr()});
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_cuda(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask) {
  auto results = add_layer_norm_backward_meta(grad_output, grad_sum, sum, normalized_shape, weight, bias, input_bias,
                                              mean, rstd, eps, dropout_p, seed, residual_dtype, output_mask);
  const auto& [grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias] = results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto cols = row_counts(sum, row_dims).cols;
  if (cols == 0) return results;  // all of them empty
  norm_backward_cuda("add_layer_norm", row_dims,
                     {true, grad_output, sum, grad_sum, weight, mean, rstd, dropout_p, seed},
                     {.grad_input = result_rows(grad_input, cols, output_mask[0]),
                      .grad_residual = result_rows(grad_residual, cols, output_mask[1]),
                      .grad_weight = result_vector(grad_weight, output_mask[2]),
                      .grad_bias = result_vector(grad_bias, output_mask[3]),
                      .grad_input_bias = result_vector(grad_input_bias, output_mask[4])});
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) {
  m.impl("add_layer_norm", add_layer_norm_cuda);
  m.impl("add_layer_norm_out", add_layer_norm_out_cuda);
  m.impl("_add_layer_norm_forward", add_layer_norm_forward_cuda);
  m.impl("_add_layer_norm_backward", add_layer_norm_backward_cuda);
}

}  // namespace resnorm
