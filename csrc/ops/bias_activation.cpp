// SPDX-License-Identifier: BSD-3-Clause
#include "bias_activation.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "support/operator_handle.h"

namespace resnorm {

namespace {

void check_bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                           double dropout_p, const OptionalTensor& seed) {
  check_floating("bias_activation", input);
  check_parameter("bias", bias, row_shape(input), input);
  TORCH_CHECK_VALUE(parse_activation(activation) != Activation::kNone,
                    "bias_activation: expected an activation, but got none");
  check_dropout(dropout_p, seed, input);
}

}  // namespace

Tensor bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                       const OptionalTensor& seed) {
  static const auto op = operator_handle("resnorm::bias_activation", &bias_activation);
  return op.call(input, bias, activation, dropout_p, seed);
}

void bias_activation_out(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                         const OptionalTensor& seed, Tensor output) {
  static const auto op = operator_handle("resnorm::bias_activation_out", &bias_activation_out);
  op.call(input, bias, activation, dropout_p, seed, std::move(output));
}

std::tuple<Tensor, Tensor, Tensor> bias_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                            const OptionalTensor& bias, c10::string_view activation,
                                                            double dropout_p, const OptionalTensor& seed,
                                                            std::array<bool, 3> output_mask) {
  static const auto op = operator_handle("resnorm::_bias_activation_backward", &bias_activation_backward);
  return op.call(grad_output, input, bias, activation, dropout_p, seed, output_mask);
}

Tensor bias_activation_meta(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                            double dropout_p, const OptionalTensor& seed) {
  check_bias_activation(input, bias, activation, dropout_p, seed);
  return at::empty_symint(input.sym_sizes(), input.options());
}

void bias_activation_out_meta(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                              double dropout_p, const OptionalTensor& seed, Tensor output) {
  check_bias_activation(input, bias, activation, dropout_p, seed);
  check_out("out", output, input.sym_sizes(), input.scalar_type(), input.device());
}

std::tuple<Tensor, Tensor, Tensor> bias_activation_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                                 const OptionalTensor& bias,
                                                                 c10::string_view activation, double dropout_p,
                                                                 const OptionalTensor& seed,
                                                                 std::array<bool, 3> output_mask) {
  check_bias_activation(input, bias, activation, dropout_p, seed);
  check_out("grad_output", grad_output, input.sym_sizes(), input.scalar_type(), input.device());
  check_wanted("bias", output_mask[1], bias, row_shape(input));
  return {empty_gradient_like(input, input.scalar_type(), output_mask[0]), empty_gradient_like(bias, output_mask[1]),
          empty_gradient_like(input, input.scalar_type(), output_mask[2])};
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "bias_activation(Tensor input, Tensor? bias=None, str activation=\"gelu\", float dropout_p=0.0, "
      "Tensor? seed=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "bias_activation_out(Tensor input, Tensor? bias, str activation, float dropout_p, Tensor? seed, "
      "Tensor(a!) output) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_bias_activation_backward(Tensor grad_output, Tensor input, Tensor? bias, str activation, float dropout_p, "
      "Tensor? seed, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) {
  m.impl("bias_activation", bias_activation_meta);
  m.impl("bias_activation_out", bias_activation_out_meta);
  m.impl("_bias_activation_backward", bias_activation_backward_meta);
}

}  // namespace resnorm
