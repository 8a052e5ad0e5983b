// SPDX-License-Identifier: BSD-3-Clause
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "bias_activation.h"
#include "bias_activation_composite.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class BiasActivationFunction : public torch::autograd::Function<BiasActivationFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const OptionalTensor& bias,
                        c10::string_view activation, double dropout_p, const OptionalTensor& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input, bias.value_or(Tensor()), seed.value_or(Tensor())});
    context->saved_data["activation"] = std::string(activation);
    context->saved_data["dropout_p"] = dropout_p;
    return bias_activation(input, bias, activation, dropout_p, seed);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto bias = saved_optional(saved[1]);
    const auto wanted = wanted_gradients<2>(*context, {true, bias.has_value()});
    const auto [grad_input, grad_bias, output] = bias_activation_backward(
        grads[0], saved[0], bias, context->saved_data["activation"].toStringRef(),
        context->saved_data["dropout_p"].toDouble(), saved_optional(saved[2]), {wanted[0], wanted[1], false});
    return {grad_input, grad_bias, Tensor(), Tensor(), Tensor()};
  }
};

Tensor bias_activation_autograd(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                                double dropout_p, const OptionalTensor& seed) {
  if (needs_formula(input, bias)) return composite::bias_activation(input, bias, activation, dropout_p, seed);
  if (requires_grad(input, bias)) return BiasActivationFunction::apply(input, bias, activation, dropout_p, seed);
  at::AutoDispatchBelowADInplaceOrView guard;
  return bias_activation(input, bias, activation, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor> bias_activation_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                                     const OptionalTensor& bias,
                                                                     c10::string_view activation, double dropout_p,
                                                                     const OptionalTensor& seed,
                                                                     std::array<bool, 3> output_mask) {
  if (needs_formula(grad_output, input, bias) || requires_grad(grad_output, input, bias)) {
    return composite::bias_activation_backward(grad_output, input, bias, activation, dropout_p, seed, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return bias_activation_backward(grad_output, input, bias, activation, dropout_p, seed, output_mask);
}

void bias_activation_out_autograd(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                                  double dropout_p, const OptionalTensor& seed, Tensor output) {
  check_no_grad_for_out("bias_activation", input, bias, output);
  at::AutoDispatchBelowAutograd guard;
  bias_activation_out(input, bias, activation, dropout_p, seed, std::move(output));
}

void bias_activation_out_inplace(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                                 double dropout_p, const OptionalTensor& seed, Tensor output) {
  // First, because it refuses tensors that may not be written.
  torch::autograd::impl::bump_version(output);
  at::AutoDispatchBelowADInplaceOrView guard;
  bias_activation_out(input, bias, activation, dropout_p, seed, output);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("bias_activation", bias_activation_autograd);
  m.impl("bias_activation_out", bias_activation_out_autograd);
  m.impl("_bias_activation_backward", bias_activation_backward_autograd);
}

TORCH_LIBRARY_IMPL(resnorm, ADInplaceOrView, m) { m.impl("bias_activation_out", bias_activation_out_inplace); }

}  // namespace resnorm
