// SPDX-License-Identifier: BSD-3-Clause
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "norm.h"
#include "norm_composite.h"
#include "norm_operators.h"
#include "residual_add_autograd.h"
#include "support/dropout.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class NormFunction : public torch::autograd::Function<NormFunction> {
 public:
  // The tensors that have gradients, for autograd to see, and the call of which they are. Returns the output, the sum
  // where there is a residual, and where they are wanted the statistics, which have no gradients of their own.
  static variable_list forward(AutogradContext* context, const Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& input_bias, const OptionalTensor& weight,
                               const OptionalTensor& bias, NormCall call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const bool returns_statistics = call.wants_statistics;
    call.wants_sum = call.wants_statistics = true;
    auto [output, sum, mean, rstd] = norm_forward(call);
    context->set_materialize_grads(false);
    variable_list saved = {residual.has_value() ? sum : input, mean, rstd, weight.value_or(Tensor()),
                           bias.value_or(Tensor())};
    context->saved_data["row_dims"] = static_cast<int64_t>(call.normalized_shape.size());
    context->saved_data["eps"] = call.eps;
    variable_list results = {output};
    if (residual.has_value()) {
      context->saved_data["dropout_p"] = call.dropout_p;
      context->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
      context->saved_data["residual_dtype"] = static_cast<int64_t>(residual->scalar_type());
      saved.insert(saved.end(), {input_bias.value_or(Tensor()), call.seed.value_or(Tensor())});
      results.push_back(sum);
    }
    context->save_for_backward(std::move(saved));
    if (returns_statistics) {
      if (mean.defined()) results.push_back(mean);
      results.push_back(rstd);
      context->mark_non_differentiable(variable_list(results.begin() + (residual.has_value() ? 2 : 1), results.end()));
    }
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto& sum = saved[0];
    const auto mean = saved_optional(saved[1]), weight = saved_optional(saved[3]), bias = saved_optional(saved[4]);
    auto& data = context->saved_data;
    const bool adds = saved.size() > 5;
    const auto input_bias = adds ? saved_optional(saved[5]) : std::nullopt;
    const auto seed = adds ? saved_optional(saved[6]) : std::nullopt;
    const auto wanted =
        wanted_gradients<5>(*context, {true, adds, input_bias.has_value(), weight.has_value(), bias.has_value()});
    const auto dropout_p = adds ? data["dropout_p"].toDouble() : 0.0;
    const auto input_dtype = adds ? data["input_dtype"].toScalarType() : sum.scalar_type();
    const auto residual_dtype = adds ? data["residual_dtype"].toScalarType() : sum.scalar_type();
    const auto grad_sum = adds ? saved_optional(grads[1]) : std::nullopt;
    if (!grads[0].defined()) {
      // Through an unused norm even a zero gradient would turn into NaN at an Inf.
      if (!grad_sum.has_value()) return variable_list(kArguments);
      auto [grad_input, grad_residual, grad_input_bias] = residual_add_gradients(
          *grad_sum, input_bias, dropout_p, seed, input_dtype, residual_dtype, {wanted[0], wanted[1], wanted[2]});
      return {grad_input, grad_residual, grad_input_bias, Tensor(), Tensor(), Tensor()};
    }

    // Without dropout the gradients of input and residual are one tensor: write it once and hand it out twice.
    const bool shared = wanted[0] && wanted[1] && dropout_threshold(dropout_p) == 0 && input_dtype == residual_dtype;
    auto computed = wanted;
    if (shared) computed[0] = false;
    const auto normalized_shape = sum.sym_sizes().slice(sum.dim() - data["row_dims"].toInt());
    const auto [grad_input, grad_residual, grad_input_bias, grad_weight, grad_bias] =
        norm_backward({grads[0], grad_sum, sum, mean, saved[2], input_bias, dropout_p, seed, residual_dtype,
                       normalized_shape, weight, bias, data["eps"].toDouble(), mean.has_value(), computed});
    return {shared ? grad_residual : grad_input, grad_residual, grad_input_bias, grad_weight, grad_bias, Tensor()};
  }

 private:
  static constexpr size_t kArguments = 6;  // of forward
};

bool needs_norm_formula(const NormCall& call) {
  return needs_formula(call.input, call.residual, call.input_bias, call.weight, call.bias);
}

bool requires_norm_grad(const NormCall& call) {
  return requires_grad(call.input, call.residual, call.input_bias, call.weight, call.bias);
}

// Results of which a backward pass is recorded.
NormResults differentiable_norm(const NormCall& call) {
  auto results = NormFunction::apply(call.input, call.residual, call.input_bias, call.weight, call.bias, call);
  NormResults named;
  auto next = results.begin();
  named.output = *next++;
  if (call.residual.has_value()) named.sum = call.wants_sum ? *next : Tensor(), ++next;
  if (call.wants_statistics && call.centered) named.mean = *next++;
  if (call.wants_statistics) named.rstd = *next;
  return named;
}

// Where nobody wants a gradient the operator itself is called on, so that a graph that is recorded there holds it.
template <class Operator, class Signature = typename Operator::Signature>
struct NormAutograd;

template <class Operator, class Result, class... Args>
struct NormAutograd<Operator, Result(Args...)> {
  static Result kernel(Args... args) {
    const auto call = norm_call(args...);
    if (needs_norm_formula(call)) return norm_result<Result>(composite::norm_forward(call), call);
    if (requires_norm_grad(call)) return norm_result<Result>(differentiable_norm(call), call);
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_norm_operator<Operator>(args...);
  }
};

NormResults norm_forward_autograd(const NormCall& call) {
  if (needs_norm_formula(call)) return composite::norm_forward(call);
  if (requires_norm_grad(call)) return differentiable_norm(call);
  at::AutoDispatchBelowADInplaceOrView guard;
  return norm_forward(call);
}

NormGradients norm_backward_autograd(const NormBackwardCall& call) {
  if (needs_formula(call.grad_output, call.grad_sum, call.sum, call.weight) ||
      requires_grad(call.grad_output, call.grad_sum, call.sum, call.weight)) {
    return composite::norm_backward(call);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return norm_backward(call);
}

void norm_out_autograd(const NormCall& call, const Tensor& output, const OptionalTensor& sum) {
  check_no_grad_for_out(norm_name(call.residual.has_value(), call.centered), call.input, call.residual, call.weight,
                        call.bias, call.input_bias, output, sum);
  at::AutoDispatchBelowAutograd guard;
  norm_out(call, output, sum);
}

void norm_out_inplace(const NormCall& call, const Tensor& output, const OptionalTensor& sum) {
  // First, because it refuses tensors that may not be written.
  torch::autograd::impl::bump_version(output);
  if (sum.has_value()) torch::autograd::impl::bump_version(*sum);
  at::AutoDispatchBelowADInplaceOrView guard;
  norm_out(call, output, sum);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("layer_norm", NormAutograd<LayerNormOperator>::kernel);
  m.impl("rms_norm", NormAutograd<RmsNormOperator>::kernel);
  m.impl("add_layer_norm", NormAutograd<AddLayerNormOperator>::kernel);
  m.impl("add_rms_norm", NormAutograd<AddRmsNormOperator>::kernel);
  m.impl("_norm_forward", NormKernel<NormForwardOperator, norm_forward_autograd>::kernel);
  m.impl("_norm_backward", NormKernel<NormBackwardOperator, norm_backward_autograd>::kernel);
  m.impl("_norm_out", norm_out_kernel<norm_out_autograd>);
}

TORCH_LIBRARY_IMPL(resnorm, ADInplaceOrView, m) { m.impl("_norm_out", norm_out_kernel<norm_out_inplace>); }

}  // namespace resnorm
