// SPDX-License-Identifier: BSD-3-Clause
#include <torch/library.h>

#include "bias_activation.h"
#include "feed_forward.h"
#include "linear.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class FeedForwardFunction : public torch::autograd::Function<FeedForwardFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight1,
                        const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
                        c10::string_view activation, double dropout_p, const OptionalTensor& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto product = training_product(input, weight1);
    // The first product can be made anew, where a backward pass is to be differentiated.
    const bool has_history = input.requires_grad() || weight1.requires_grad();
    context->save_for_backward({has_history ? input : Tensor(), has_history ? weight1 : Tensor(),
                                bias1.value_or(Tensor()), weight2, product, seed.value_or(Tensor())});
    context->saved_data["activation"] = std::string(activation);
    context->saved_data["dropout_p"] = dropout_p;
    context->saved_data["has_bias2"] = bias2.has_value();
    return training_product(bias_activation(product, bias1, activation, dropout_p, seed), weight2, bias2);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto &input = saved[0], &weight1 = saved[1], &weight2 = saved[3], &grad = grads[0];
    const auto bias1 = saved_optional(saved[2]), seed = saved_optional(saved[5]);
    const auto wanted =
        wanted_gradients<5>(*context, {true, true, bias1.has_value(), true, context->saved_data["has_bias2"].toBool()});
    const bool makes_product = at::GradMode::is_enabled() && input.defined();
    const auto product = makes_product ? training_product(input, weight1) : saved[4];
    const bool wants_product = wanted[0] || wanted[1];
    Tensor grad_product, grad_bias1, activated;
    if (wants_product || wanted[2] || wanted[3]) {
      std::tie(grad_product, grad_bias1, activated) = bias_activation_backward(
          training_product(grad, weight2.t()), product, bias1, context->saved_data["activation"].toStringRef(),
          context->saved_data["dropout_p"].toDouble(), seed, {wants_product, wanted[2], wanted[3]});
    }
    return {wanted[0] ? training_product(grad_product, weight1.t()) : Tensor(),
            wanted[1] ? weight_gradient(grad_product, input) : Tensor(),
            grad_bias1,
            wanted[3] ? weight_gradient(grad, activated) : Tensor(),
            wanted[4] ? bias_gradient(grad) : Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor feed_forward_autograd(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                             const Tensor& weight2, const OptionalTensor& bias2, c10::string_view activation,
                             double dropout_p, const OptionalTensor& seed) {
  check_feed_forward(input, activation, dropout_p, seed);
  const bool records = requires_grad(input, weight1, bias1, weight2, bias2);
  if (needs_formula(input, weight1, bias1, weight2, bias2) ||
      (records && !(has_training_product(input, weight1) && has_training_product(input, weight2)))) {
    return composite::feed_forward(input, weight1, bias1, weight2, bias2, activation, dropout_p, seed);
  }
  if (records) return FeedForwardFunction::apply(input, weight1, bias1, weight2, bias2, activation, dropout_p, seed);
  at::AutoDispatchBelowADInplaceOrView guard;
  return feed_forward(input, weight1, bias1, weight2, bias2, activation, dropout_p, seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) { m.impl("feed_forward", feed_forward_autograd); }

}  // namespace resnorm
