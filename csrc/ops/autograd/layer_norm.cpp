// SPDX-License-Identifier: BSD-3-Clause
#include "../layer_norm.h"

#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "../composite/layer_norm.h"
#include "transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LayerNormFunction : public torch::autograd::Function<LayerNormFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] = layer_norm_forward(input, normalized_shape, weight, bias, eps);
    context->save_for_backward({input, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, rstd});
    context->saved_data["row_dims"] = static_cast<int64_t>(normalized_shape.size());
    context->saved_data["eps"] = eps;
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto weight = saved_optional(saved[1]), bias = saved_optional(saved[2]);
    const auto wanted = wanted_gradients<3>(*context, {true, weight.has_value(), bias.has_value()});
    const auto normalized_shape = saved[0].sym_sizes().slice(saved[0].dim() - context->saved_data["row_dims"].toInt());
    const auto [grad_input, grad_weight, grad_bias] =
        layer_norm_backward(grads[0], saved[0], normalized_shape, weight, bias, saved[3], saved[4],
                            context->saved_data["eps"].toDouble(), wanted);
    return {if_wanted(wanted[0], grad_input), Tensor(), if_wanted(wanted[1], grad_weight),
            if_wanted(wanted[2], grad_bias), Tensor()};
  }
};

Tensor layer_norm_autograd(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps) {
  if (needs_formula(input, weight, bias)) {
    return composite::layer_norm(input, normalized_shape, weight, bias, eps);
  }
  if (requires_grad(input, weight, bias)) {
    return LayerNormFunction::apply(input, normalized_shape, weight, bias, eps);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return layer_norm(input, normalized_shape, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_autograd(
    const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, double eps, std::array<bool, 3> output_mask) {
  if (needs_formula(grad_output, input, weight) || requires_grad(grad_output, input, weight)) {
    return composite::layer_norm_backward(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps,
                                          output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return layer_norm_backward(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps, output_mask);
}

void layer_norm_out_autograd(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                             const OptionalTensor& bias, double eps, Tensor output) {
  check_no_grad_for_out("layer_norm", input, weight, bias, output);
  at::AutoDispatchBelowAutograd guard;
  layer_norm_out(input, normalized_shape, weight, bias, eps, std::move(output));
}

void layer_norm_out_inplace(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps, Tensor output) {
  // First, because it refuses tensors that may not be written.
  torch::autograd::increment_version(output);
  at::AutoDispatchBelowADInplaceOrView guard;
  layer_norm_out(input, normalized_shape, weight, bias, eps, output);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("layer_norm", layer_norm_autograd);
  m.impl("layer_norm_out", layer_norm_out_autograd);
  m.impl("_layer_norm_backward", layer_norm_backward_autograd);
}

TORCH_LIBRARY_IMPL(resnorm, ADInplaceOrView, m) { m.impl("layer_norm_out", layer_norm_out_inplace); }

}  // namespace resnorm
