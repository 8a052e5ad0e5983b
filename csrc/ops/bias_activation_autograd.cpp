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
                        c10::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input, bias.value_or(Tensor())});
    context->saved_data["activation"] = std::string(activation);
    return bias_activation(input, bias, activation);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto bias = saved_optional(saved[1]);
    const auto wanted = wanted_gradients<2>(*context, {true, bias.has_value()});
    const auto [grad_input, grad_bias] =
        bias_activation_backward(grads[0], saved[0], bias, context->saved_data["activation"].toStringRef(), wanted);
    return {grad_input, grad_bias, Tensor()};
  }
};

Tensor bias_activation_autograd(const Tensor& input, const OptionalTensor& bias, c10::string_view activation) {
  if (needs_formula(input, bias)) return composite::bias_activation(input, bias, activation);
  if (requires_grad(input, bias)) return BiasActivationFunction::apply(input, bias, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  return bias_activation(input, bias, activation);
}

std::tuple<Tensor, Tensor> bias_activation_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                             const OptionalTensor& bias, c10::string_view activation,
                                                             std::array<bool, 2> output_mask) {
  if (needs_formula(grad_output, input, bias) || requires_grad(grad_output, input, bias)) {
    return composite::bias_activation_backward(grad_output, input, bias, activation, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return bias_activation_backward(grad_output, input, bias, activation, output_mask);
}

void bias_activation_out_autograd(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                                  Tensor output) {
  check_no_grad_for_out("bias_activation", input, bias, output);
  at::AutoDispatchBelowAutograd guard;
  bias_activation_out(input, bias, activation, std::move(output));
}

void bias_activation_out_inplace(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                                 Tensor output) {
  // First, because it refuses tensors that may not be written.
  torch::autograd::impl::bump_version(output);
  at::AutoDispatchBelowADInplaceOrView guard;
  bias_activation_out(input, bias, activation, output);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("bias_activation", bias_activation_autograd);
  m.impl("bias_activation_out", bias_activation_out_autograd);
  m.impl("_bias_activation_backward", bias_activation_backward_autograd);
}

TORCH_LIBRARY_IMPL(resnorm, ADInplaceOrView, m) { m.impl("bias_activation_out", bias_activation_out_inplace); }

}  // namespace resnorm
