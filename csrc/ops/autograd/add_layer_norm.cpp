// SPDX-License-Identifier: BSD-3-Clause
#include "../add_layer_norm.h"

#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "../composite/add_layer_norm.h"
#include "../dropout.h"
#include "residual_add.h"
#include "transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AddLayerNormFunction : public torch::autograd::Function<AddLayerNormFunction> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& residual,
                               c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                               double dropout_p, const OptionalTensor& seed,
                               std::optional<at::ScalarType> residual_dtype) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, sum, mean, rstd] = add_layer_norm_forward(input, residual, normalized_shape, weight, bias, eps,
                                                            input_bias, dropout_p, seed, residual_dtype);
    context->save_for_backward({sum, weight.value_or(Tensor()), bias.value_or(Tensor()), input_bias.value_or(Tensor()),
                                mean, rstd, seed.value_or(Tensor())});
    context->set_materialize_grads(false);
    context->saved_data["normalized_shape"] = normalized_shape.vec();
    context->saved_data["eps"] = eps;
    context->saved_data["dropout_p"] = dropout_p;
    context->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    context->saved_data["residual_dtype"] = static_cast<int64_t>(residual.scalar_type());
    return {output, sum};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto& sum = saved[0];
    const auto weight = saved_optional(saved[1]), bias = saved_optional(saved[2]);
    const auto input_bias = saved_optional(saved[3]), seed = saved_optional(saved[6]);
    const auto dropout_p = context->saved_data["dropout_p"].toDouble();
    const auto input_dtype = context->saved_data["input_dtype"].toScalarType();
    const auto residual_dtype = context->saved_data["residual_dtype"].toScalarType();
    const auto wanted =
        wanted_gradients<5>(*context, {true, true, weight.has_value(), bias.has_value(), input_bias.has_value()});
    if (!grads[0].defined()) {
      if (!grads[1].defined()) return by_argument({}, {}, {}, {}, {});
      return backward_of_sum(grads[1], input_bias, dropout_p, seed, input_dtype, residual_dtype, wanted);
    }

    // Without dropout the two gradients are one tensor: write it once and hand it out twice.
    const bool shared = dropout_threshold(dropout_p) == 0 && input_dtype == residual_dtype;
    auto mask = wanted;
    if (shared) {
      mask[0] = false;
      mask[1] = wanted[0] || wanted[1];
    }
    const auto [grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias] = add_layer_norm_backward(
        grads[0], saved_optional(grads[1]), sum, context->saved_data["normalized_shape"].toSymIntVector(), weight, bias,
        input_bias, saved[4], saved[5], context->saved_data["eps"].toDouble(), dropout_p, seed, residual_dtype, mask);
    return by_argument(if_wanted(wanted[0], shared ? grad_residual : grad_input), if_wanted(wanted[1], grad_residual),
                       if_wanted(wanted[2], grad_weight), if_wanted(wanted[3], grad_bias),
                       if_wanted(wanted[4], grad_input_bias));
  }

 private:
  // Where only the sum was used: through an unused norm even a zero gradient would turn into NaN at an Inf.
  static variable_list backward_of_sum(const Tensor& grad_sum, const OptionalTensor& input_bias, double dropout_p,
                                       const OptionalTensor& seed, at::ScalarType input_dtype,
                                       at::ScalarType residual_dtype, const std::array<bool, 5>& wanted) {
    const auto [grad_input, grad_residual, grad_input_bias] = residual_add_gradients(
        grad_sum, input_bias, dropout_p, seed, input_dtype, residual_dtype, {wanted[0], wanted[1], wanted[4]});
    return by_argument(grad_input, grad_residual, {}, {}, grad_input_bias);
  }

  // In the order of forward's arguments.
  static variable_list by_argument(const Tensor& input, const Tensor& residual, const Tensor& weight,
                                   const Tensor& bias, const Tensor& input_bias) {
    return {input,
            residual,
            /*normalized_shape=*/Tensor(),
            weight,
            bias,
            /*eps=*/Tensor(),
            input_bias,
            /*dropout_p=*/Tensor(),
            /*seed=*/Tensor(),
            /*residual_dtype=*/Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_layer_norm_autograd(const Tensor& input, const Tensor& residual,
                                                   c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double eps,
                                                   const OptionalTensor& input_bias, double dropout_p,
                                                   const OptionalTensor& seed, bool prenorm,
                                                   std::optional<at::ScalarType> residual_dtype) {
  if (needs_formula(input, residual, weight, bias, input_bias)) {
    return composite::add_layer_norm(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                                     prenorm, residual_dtype);
  }
  if (requires_grad(input, residual, weight, bias, input_bias)) {
    auto results = AddLayerNormFunction::apply(input, residual, normalized_shape, weight, bias, eps, input_bias,
                                               dropout_p, seed, residual_dtype);
    return {results[0], prenorm ? results[1] : unused_result(input)};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return add_layer_norm(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed, prenorm,
                        residual_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_autograd(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask) {
  if (needs_formula(grad_output, grad_sum, sum, weight) || requires_grad(grad_output, grad_sum, sum, weight)) {
    return composite::add_layer_norm_backward(grad_output, grad_sum, sum, normalized_shape, weight, bias, input_bias,
                                              mean, rstd, eps, dropout_p, seed, residual_dtype, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return add_layer_norm_backward(grad_output, grad_sum, sum, normalized_shape, weight, bias, input_bias, mean, rstd,
                                 eps, dropout_p, seed, residual_dtype, output_mask);
}

void add_layer_norm_out_autograd(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                                 const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                 const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                                 std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  check_no_grad_for_out("add_layer_norm", input, residual, weight, bias, input_bias, output, sum);
  at::AutoDispatchBelowAutograd guard;
  add_layer_norm_out(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed, residual_dtype,
                     std::move(output), std::move(sum));
}

void add_layer_norm_out_inplace(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                                const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                                std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  // First, because it refuses tensors that may not be written.
  torch::autograd::increment_version(output);
  if (sum.has_value()) torch::autograd::increment_version(*sum);
  at::AutoDispatchBelowADInplaceOrView guard;
  add_layer_norm_out(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed, residual_dtype,
                     output, sum);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("add_layer_norm", add_layer_norm_autograd);
  m.impl("add_layer_norm_out", add_layer_norm_out_autograd);
  m.impl("_add_layer_norm_backward", add_layer_norm_backward_autograd);
}

TORCH_LIBRARY_IMPL(resnorm, ADInplaceOrView, m) { m.impl("add_layer_norm_out", add_layer_norm_out_inplace); }

}  // namespace resnorm
