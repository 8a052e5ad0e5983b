// SPDX-License-Identifier: BSD-3-Clause
#include "bias_activation_composite.h"

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "activation_composite.h"
#include "support/overlap.h"
#include "support/philox.h"

namespace resnorm::composite {

namespace {

// input + bias, unrounded.
Tensor preactivation(const Tensor& input, const OptionalTensor& bias) {
  const auto accumulation = accumulation_dtype({input.scalar_type()});
  const auto widened = input.to(accumulation);
  return bias.has_value() ? widened + bias->to(accumulation) : widened;
}

void bias_activation_out(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                         const OptionalTensor& seed, Tensor output) {
  bias_activation_out_meta(input, bias, activation, dropout_p, seed, output);
  check_overlap(output, {input}, {bias, seed});
  output.copy_(bias_activation(input, bias, activation, dropout_p, seed));
}

}  // namespace

Tensor bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                       const OptionalTensor& seed) {
  bias_activation_meta(input, bias, activation, dropout_p, seed);
  const auto activated = activate(parse_activation(activation), preactivation(input, bias));
  return dropout(activated, dropout_p, seed).to(input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> bias_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                            const OptionalTensor& bias, c10::string_view activation,
                                                            double dropout_p, const OptionalTensor& seed,
                                                            std::array<bool, 3> output_mask) {
  bias_activation_backward_meta(grad_output, input, bias, activation, dropout_p, seed, output_mask);
  const auto x = preactivation(input, bias);
  const auto grad_activated = dropout(grad_output.to(x.scalar_type()), dropout_p, seed);
  const auto grad_input = activate_backward(parse_activation(activation), grad_activated, x);
  return {output_mask[0] ? grad_input.to(input.scalar_type()) : Tensor(),
          parameter_gradient(output_mask[1], grad_input, bias),
          output_mask[2] ? bias_activation(input, bias, activation, dropout_p, seed) : Tensor()};
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  m.impl("bias_activation", BiasActivation::kernel);
  m.impl("bias_activation_out", bias_activation_out);
  m.impl("_bias_activation_backward", BiasActivationBackward::kernel);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) {
  m.impl("bias_activation", bias_activation);
  m.impl("bias_activation_out", bias_activation_out);
  m.impl("_bias_activation_backward", bias_activation_backward);
}

}  // namespace resnorm::composite
