// SPDX-License-Identifier: BSD-3-Clause
#include "add_layer_norm.h"

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "../overlap.h"
#include "layer_norm.h"
#include "materialized.h"
#include "philox.h"
#include "residual_add.h"

namespace resnorm::composite {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  add_layer_norm_forward_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                              residual_dtype);
  const auto dtype = sum_dtype(input, residual, residual_dtype);
  const auto sum = exact_sum(input, residual, input_bias, dropout_p, seed, dtype);
  const auto accumulation = accumulation_dtype({input.scalar_type(), dtype});
  auto [output, mean, rstd] = normalize(sum.to(accumulation), normalized_shape, weight, bias, eps);
  return {output.to(input.scalar_type()), sum.to(dtype), std::move(mean), std::move(rstd)};
}

void add_layer_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                        const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                        std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  add_layer_norm_out_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                          residual_dtype, output, sum);
  check_overlap(output, {input, residual}, {weight, bias, input_bias, seed, sum});
  if (sum.has_value()) check_overlap(*sum, {input, residual}, {weight, bias, input_bias, seed});
  const auto [new_output, new_sum] = add_layer_norm(input, residual, normalized_shape, weight, bias, eps, input_bias,
                                                    dropout_p, seed, sum.has_value(), residual_dtype);
  output.copy_(new_output);
  if (sum.has_value()) sum->copy_(new_sum);
}

}  // namespace

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                          double dropout_p, const OptionalTensor& seed, bool prenorm,
                                          std::optional<at::ScalarType> residual_dtype) {
  auto [output, sum, mean, rstd] = add_layer_norm_forward(input, residual, normalized_shape, weight, bias, eps,
                                                          input_bias, dropout_p, seed, residual_dtype);
  return {std::move(output), prenorm ? std::move(sum) : unused_result(input)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask) {
  add_layer_norm_backward_meta(grad_output, grad_sum, sum, normalized_shape, weight, bias, input_bias, mean, rstd, eps,
                               dropout_p, seed, residual_dtype, output_mask);
  const auto accumulation = mean.scalar_type();
  const auto gradients =
      normalize_backward(grad_output.to(accumulation), sum.to(accumulation), normalized_shape, weight, eps);
  const auto grad_residual = grad_sum.has_value() ? gradients.input + grad_sum->to(accumulation) : gradients.input;
  const auto grad_input = dropout(grad_residual, dropout_p, seed);
  const auto parameter_gradient = [&](bool wanted, const Tensor& gradient, const OptionalTensor& parameter) {
    return requested_gradient(wanted, gradient, parameter.has_value() ? parameter->scalar_type() : accumulation, sum);
  };
  return {requested_gradient(output_mask[0], grad_input, grad_output.scalar_type(), sum),
          requested_gradient(output_mask[1], grad_residual, residual_dtype, sum),
          parameter_gradient(output_mask[2], gradients.weight, weight),
          parameter_gradient(output_mask[3], gradients.bias, bias),
          parameter_gradient(output_mask[4], grad_input.sum_to_size_symint(normalized_shape), input_bias)};
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  m.impl("add_layer_norm", Materialized<add_layer_norm_meta, add_layer_norm>::kernel);
  m.impl("add_layer_norm_out", add_layer_norm_out);
  m.impl("_add_layer_norm_forward", Materialized<add_layer_norm_forward_meta, add_layer_norm_forward>::kernel);
  m.impl("_add_layer_norm_backward", Materialized<add_layer_norm_backward_meta, add_layer_norm_backward>::kernel);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) {
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("add_layer_norm_out", add_layer_norm_out);
  m.impl("_add_layer_norm_forward", add_layer_norm_forward);
  m.impl("_add_layer_norm_backward", add_layer_norm_backward);
}

}  // namespace resnorm::composite
