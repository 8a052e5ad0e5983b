// SPDX-License-Identifier: BSD-3-Clause
#include "add_layer_norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "operator_handle.h"

namespace resnorm {

namespace {

void check_add_layer_norm(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                          const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias,
                          double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  check_normalized_shape(input, normalized_shape);
  check_floating("add_layer_norm", input);
  check_residual("add_layer_norm", input, residual, residual_dtype);
  check_parameter("weight", weight, normalized_shape, input);
  check_parameter("bias", bias, normalized_shape, input);
  check_parameter("input_bias", input_bias, normalized_shape, input);
  check_dropout(dropout_p, seed, input);
}

Tensor empty_sum(const Tensor& input, const Tensor& residual, std::optional<at::ScalarType> residual_dtype) {
  return at::empty_symint(input.sym_sizes(), input.options().dtype(sum_dtype(input, residual, residual_dtype)));
}

}  // namespace

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                          double dropout_p, const OptionalTensor& seed, bool prenorm,
                                          std::optional<at::ScalarType> residual_dtype) {
  static const auto op = operator_handle("resnorm::add_layer_norm", &add_layer_norm);
  return op.call(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed, prenorm,
                 residual_dtype);
}

void add_layer_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                        const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                        std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  static const auto op = operator_handle("resnorm::add_layer_norm_out", &add_layer_norm_out);
  op.call(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed, residual_dtype,
          std::move(output), std::move(sum));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  static const auto op = operator_handle("resnorm::_add_layer_norm_forward", &add_layer_norm_forward);
  return op.call(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed, residual_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask) {
  static const auto op = operator_handle("resnorm::_add_layer_norm_backward", &add_layer_norm_backward);
  return op.call(grad_output, grad_sum, sum, normalized_shape, weight, bias, input_bias, mean, rstd, eps, dropout_p,
                 seed, residual_dtype, output_mask);
}

std::tuple<Tensor, Tensor> add_layer_norm_meta(const Tensor& input, const Tensor& residual,
                                               c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                               const OptionalTensor& bias, double /*eps*/,
                                               const OptionalTensor& input_bias, double dropout_p,
                                               const OptionalTensor& seed, bool prenorm,
                                               std::optional<at::ScalarType> residual_dtype) {
  check_add_layer_norm(input, residual, normalized_shape, weight, bias, input_bias, dropout_p, seed, residual_dtype);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          prenorm ? empty_sum(input, residual, residual_dtype) : unused_result(input)};
}

void add_layer_norm_out_meta(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                             const OptionalTensor& weight, const OptionalTensor& bias, double /*eps*/,
                             const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                             std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  check_add_layer_norm(input, residual, normalized_shape, weight, bias, input_bias, dropout_p, seed, residual_dtype);
  check_out("out", output, input.sym_sizes(), input.scalar_type(), input.device());
  if (sum.has_value()) {
    check_out("the sum's out", *sum, input.sym_sizes(), sum_dtype(input, residual, residual_dtype), input.device());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward_meta(
    const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  auto [output, sum] = add_layer_norm_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p,
                                           seed, /*prenorm=*/true, residual_dtype);
  auto [mean, rstd] =
      empty_statistics(input, normalized_shape, accumulation_dtype({input.scalar_type(), sum.scalar_type()}));
  return {std::move(output), std::move(sum), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_meta(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double /*eps*/, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask) {
  check_normalized_shape(sum, normalized_shape);
  check_dropout(dropout_p, seed, sum);
  check_shape("grad_output", grad_output, sum.sym_sizes());
  if (grad_sum.has_value()) check_shape("grad_sum", *grad_sum, sum.sym_sizes());
  check_statistics(mean, rstd, sum, normalized_shape,
                   accumulation_dtype({grad_output.scalar_type(), sum.scalar_type()}));
  if (weight.has_value()) check_shape("weight", *weight, normalized_shape);
  check_wanted("weight", output_mask[2], weight, normalized_shape);
  check_wanted("bias", output_mask[3], bias, normalized_shape);
  check_wanted("input_bias", output_mask[4], input_bias, normalized_shape);
  const auto sizes = sum.sym_sizes();
  return {output_mask[0] ? at::empty_symint(sizes, grad_output.options()) : unused_result(sum),
          output_mask[1] ? at::empty_symint(sizes, sum.options().dtype(residual_dtype)) : unused_result(sum),
          empty_gradient_like(weight, output_mask[2], sum), empty_gradient_like(bias, output_mask[3], sum),
          empty_gradient_like(input_bias, output_mask[4], sum)};
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, "
      "Tensor? bias=None, float eps=1e-05, Tensor? input_bias=None, float dropout_p=0.0, Tensor? seed=None, "
      "bool prenorm=False, ScalarType? residual_dtype=None) -> (Tensor output, Tensor sum)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "add_layer_norm_out(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
      "float eps, Tensor? input_bias, float dropout_p, Tensor? seed, ScalarType? residual_dtype, Tensor(a!) output, "
      "Tensor(b!)? sum) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_add_layer_norm_forward(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, "
      "Tensor? bias, float eps, Tensor? input_bias, float dropout_p, Tensor? seed, ScalarType? residual_dtype) "
      "-> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, SymInt[] normalized_shape, "
      "Tensor? weight, Tensor? bias, Tensor? input_bias, Tensor mean, Tensor rstd, float eps, float dropout_p, "
      "Tensor? seed, ScalarType residual_dtype, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) {
  m.impl("add_layer_norm", add_layer_norm_meta);
  m.impl("add_layer_norm_out", add_layer_norm_out_meta);
  m.impl("_add_layer_norm_forward", add_layer_norm_forward_meta);
  m.impl("_add_layer_norm_backward", add_layer_norm_backward_meta);
}

}  // namespace resnorm
