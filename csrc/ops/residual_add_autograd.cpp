// SPDX-License-Identifier: BSD-3-Clause
#include "residual_add_autograd.h"

#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "residual_add.h"
#include "residual_add_composite.h"
#include "support/dropout.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ResidualAddFunction : public torch::autograd::Function<ResidualAddFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& residual,
                        const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                        std::optional<at::ScalarType> residual_dtype) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input_bias.value_or(Tensor()), seed.value_or(Tensor())});
    context->saved_data["dropout_p"] = dropout_p;
    context->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    context->saved_data["residual_dtype"] = static_cast<int64_t>(residual.scalar_type());
    return residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto input_bias = saved_optional(saved[0]), seed = saved_optional(saved[1]);
    const auto dropout_p = context->saved_data["dropout_p"].toDouble();
    const auto input_dtype = context->saved_data["input_dtype"].toScalarType();
    const auto residual_dtype = context->saved_data["residual_dtype"].toScalarType();
    const auto [grad_input, grad_residual, grad_input_bias] =
        residual_add_gradients(grads[0], input_bias, dropout_p, seed, input_dtype, residual_dtype,
                               wanted_gradients<3>(*context, {true, true, input_bias.has_value()}));
    return {grad_input, grad_residual, grad_input_bias, Tensor(), Tensor(), Tensor()};
  }
};

Tensor residual_add_autograd(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                             double dropout_p, const OptionalTensor& seed,
                             std::optional<at::ScalarType> residual_dtype) {
  if (needs_formula(input, residual, input_bias)) {
    return composite::residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype);
  }
  if (requires_grad(input, residual, input_bias)) {
    return ResidualAddFunction::apply(input, residual, input_bias, dropout_p, seed, residual_dtype);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype);
}

std::tuple<Tensor, Tensor> residual_add_backward_autograd(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                          double dropout_p, const OptionalTensor& seed,
                                                          at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  if (needs_formula(grad_output) || requires_grad(grad_output)) {
    return composite::residual_add_backward(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return residual_add_backward(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
}

void residual_add_out_autograd(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                               double dropout_p, const OptionalTensor& seed,
                               std::optional<at::ScalarType> residual_dtype, Tensor output) {
  check_no_grad_for_out("residual_add", input, residual, input_bias, output);
  at::AutoDispatchBelowAutograd guard;
  residual_add_out(input, residual, input_bias, dropout_p, seed, residual_dtype, std::move(output));
}

void residual_add_out_inplace(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                              double dropout_p, const OptionalTensor& seed,
                              std::optional<at::ScalarType> residual_dtype, Tensor output) {
  // First, because it refuses tensors that may not be written.
  torch::autograd::impl::bump_version(output);
  at::AutoDispatchBelowADInplaceOrView guard;
  residual_add_out(input, residual, input_bias, dropout_p, seed, residual_dtype, output);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> residual_add_gradients(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                          double dropout_p, const OptionalTensor& seed,
                                                          at::ScalarType input_dtype, at::ScalarType residual_dtype,
                                                          const std::array<bool, 3>& wanted) {
  // Without dropout the input's gradient is the output's: handed out, not copied.
  const bool passes = dropout_threshold(dropout_p) == 0 && input_dtype == grad_output.scalar_type();
  Tensor grad_input, grad_input_bias;
  if ((wanted[0] && !passes) || wanted[2]) {
    std::tie(grad_input, grad_input_bias) =
        residual_add_backward(grad_output, input_bias, dropout_p, seed, input_dtype, {wanted[0] && !passes, wanted[2]});
  }
  return {wanted[0] && passes ? grad_output : grad_input, wanted[1] ? grad_output.to(residual_dtype) : Tensor(),
          grad_input_bias};
}

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("residual_add", residual_add_autograd);
  m.impl("residual_add_out", residual_add_out_autograd);
  m.impl("_residual_add_backward", residual_add_backward_autograd);
}

TORCH_LIBRARY_IMPL(resnorm, ADInplaceOrView, m) { m.impl("residual_add_out", residual_add_out_inplace); }

}  // namespace resnorm
