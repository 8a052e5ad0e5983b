// SPDX-License-Identifier: BSD-3-Clause
#include "bias_activation.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "support/operator_handle.h"

namespace resnorm {

namespace {

void check_bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation) {
  check_floating("bias_activation", input);
  check_parameter("bias", bias, row_shape(input), input);
  TORCH_CHECK_VALUE(parse_activation(activation) != Activation::kNone,
                    "bias_activation: expected an activation, but got none");
}

}  // namespace

Tensor bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation) {
  static const auto op = operator_handle("resnorm::bias_activation", &bias_activation);
  return op.call(input, bias, activation);
}

void bias_activation_out(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, Tensor output) {
  static const auto op = operator_handle("resnorm::bias_activation_out", &bias_activation_out);
  op.call(input, bias, activation, std::move(output));
}

std::tuple<Tensor, Tensor> bias_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                    const OptionalTensor& bias, c10::string_view activation,
                                                    std::array<bool, 2> output_mask) {
  static const auto op = operator_handle("resnorm::_bias_activation_backward", &bias_activation_backward);
  return op.call(grad_output, input, bias, activation, output_mask);
}

Tensor bias_activation_meta(const Tensor& input, const OptionalTensor& bias, c10::string_view activation) {
  check_bias_activation(input, bias, activation);
  return at::empty_symint(input.sym_sizes(), input.options());
}

void bias_activation_out_meta(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                              Tensor output) {
  check_bias_activation(input, bias, activation);
  check_out("out", output, input.sym_sizes(), input.scalar_type(), input.device());
}

std::tuple<Tensor, Tensor> bias_activation_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                         const OptionalTensor& bias, c10::string_view activation,
                                                         std::array<bool, 2> output_mask) {
  check_bias_activation(input, bias, activation);
  check_out("grad_output", grad_output, input.sym_sizes(), input.scalar_type(), input.device());
  check_wanted("bias", output_mask[1], bias, row_shape(input));
  return {empty_gradient_like(input, input.scalar_type(), output_mask[0]), empty_gradient_like(bias, output_mask[1])};
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def("bias_activation(Tensor input, Tensor? bias=None, str activation=\"gelu\") -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("bias_activation_out(Tensor input, Tensor? bias, str activation, Tensor(a!) output) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "_bias_activation_backward(Tensor grad_output, Tensor input, Tensor? bias, str activation, bool[2] output_mask) "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) {
  m.impl("bias_activation", bias_activation_meta);
  m.impl("bias_activation_out", bias_activation_out_meta);
  m.impl("_bias_activation_backward", bias_activation_backward_meta);
}

}  // namespace resnorm
