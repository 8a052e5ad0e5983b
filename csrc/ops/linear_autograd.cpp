// SPDX-License-Identifier: BSD-3-Clause
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../engine/linear/choice.h"
#include "bias_activation.h"
#include "linear.h"
#include "linear_composite.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Its derivatives are products again, so it is differentiable any number of times.
class ProductFunction : public torch::autograd::Function<ProductFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor()});
    context->saved_data["has_bias"] = bias.has_value();
    return multiply(input, weight, bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto &input = saved[0], &weight = saved[1], &grad = grads[0];
    const auto wanted = wanted_gradients<3>(*context, {true, true, context->saved_data["has_bias"].toBool()});
    return {wanted[0] ? training_product(grad, weight.t()) : Tensor(),
            wanted[1] ? weight_gradient(grad, input) : Tensor(), wanted[2] ? bias_gradient(grad) : Tensor()};
  }

  static Tensor multiply(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    const auto& backend = engine::fastest_unpacked_backend(input, weight);
    return engine::multiply(backend, input, weight, bias, Activation::kNone, weight.size(0));
  }
};

Tensor as_matrix(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::string_view activation) {
  const bool records = requires_grad(input, weight, bias);
  if (needs_formula(input, weight, bias) || (records && !has_training_product(input, weight))) {
    return composite::linear(input, weight, bias, activation);
  }
  if (records) {
    if (parse_activation(activation) == Activation::kNone) return training_product(input, weight, bias);
    return bias_activation(training_product(input, weight), bias, activation, /*dropout_p=*/0, /*seed=*/std::nullopt);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear(input, weight, bias, activation);
}

}  // namespace

bool has_training_product(const Tensor& input, const Tensor& weight) {
  // Not of a subclass, nor one of a batch that vmap, or autograd.grad's is_grads_batched, computes at once.
  constexpr c10::DispatchKeySet kOthers{c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::Batched};
  const auto is_plain = [&](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.key_set().has_any(kOthers);
  };
  return is_plain(input) && is_plain(weight) && input.numel() > 0 && weight.numel() > 0;
}

Tensor training_product(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  // A gradient may be what transforms or forward mode make of it.
  if (needs_formula(input, weight, bias) || !has_training_product(input, weight)) {
    return composite::linear(input, weight, bias, "none");
  }
  check_linear(input, weight, bias);
  if (requires_grad(input, weight, bias)) return ProductFunction::apply(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ProductFunction::multiply(input, weight, bias);
}

Tensor weight_gradient(const Tensor& grad_output, const Tensor& input) {
  return at::mm(as_matrix(grad_output).t(), as_matrix(input));
}

Tensor bias_gradient(const Tensor& grad_output) { return as_matrix(grad_output).sum(0); }

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) { m.impl("linear", linear_autograd); }

}  // namespace resnorm
