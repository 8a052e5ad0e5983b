// SPDX-License-Identifier: BSD-3-Clause
#include "norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "norm_operators.h"
#include "support/autocast.h"
#include "support/overlap.h"

namespace resnorm {

namespace {

const OptionalTensor kAbsent;

double eps_or_default(std::optional<double> eps, const NormCall& call) {
  if (eps.has_value()) return *eps;
  return norm_accumulation_dtype(call) == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                      : std::numeric_limits<float>::epsilon();
}

void check_norm(const NormCall& call) {
  const bool adds = call.residual.has_value();
  const char* name = norm_name(adds, call.centered);
  check_normalized_shape(call.input, call.normalized_shape);
  check_floating(name, call.input);
  check_parameter("weight", call.weight, call.normalized_shape, call.input);
  check_parameter("bias", call.bias, call.normalized_shape, call.input);
  TORCH_CHECK(call.centered || !call.bias.has_value(), name, ": expected no bias, but got one");
  if (adds) {
    check_residual(name, call.input, *call.residual, call.residual_dtype);
    check_parameter("input_bias", call.input_bias, call.normalized_shape, call.input);
    check_dropout(call.dropout_p, call.seed, call.input);
  } else {
    TORCH_CHECK(!call.input_bias.has_value() && call.dropout_p == 0 && !call.residual_dtype.has_value(), name,
                ": expected a residual beside input_bias, dropout_p and residual_dtype, but got None");
  }
}

template <class Argument>
Argument to_float(const Argument& argument) {
  if constexpr (std::is_same_v<Argument, Tensor> || std::is_same_v<Argument, OptionalTensor>) {
    return autocast_to(at::kFloat, argument, at::kCUDA);
  } else {
    return argument;
  }
}

template <class Operator, class Signature = typename Operator::Signature>
struct NormAutocast;

template <class Operator, class Result, class... Args>
struct NormAutocast<Operator, Result(Args...)> {
  static Result kernel(Args... args) {
    c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
    return call_norm_operator<Operator>(to_float(args)...);
  }
};

}  // namespace

NormCall norm_call(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                   const OptionalTensor& bias, double eps) {
  return {input, std::nullopt, kAbsent,          0.0, kAbsent, std::nullopt, normalized_shape, weight,
          bias,  eps,          /*centered=*/true};
}

NormCall norm_call(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                   std::optional<double> eps) {
  NormCall call = {input,   std::nullopt, kAbsent,           0.0, kAbsent, std::nullopt, normalized_shape, weight,
                   kAbsent, 0.0,          /*centered=*/false};
  call.eps = eps_or_default(eps, call);
  return call;
}

NormCall norm_call(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                   const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed, bool prenorm,
                   std::optional<at::ScalarType> residual_dtype) {
  return {input,
          residual,
          input_bias,
          dropout_p,
          seed,
          residual_dtype,
          normalized_shape,
          weight,
          bias,
          eps,
          /*centered=*/true,
          prenorm};
}

NormCall norm_call(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                   const OptionalTensor& weight, std::optional<double> eps, const OptionalTensor& input_bias,
                   double dropout_p, const OptionalTensor& seed, bool prenorm,
                   std::optional<at::ScalarType> residual_dtype) {
  NormCall call = {input,  residual, input_bias, dropout_p,          seed,   residual_dtype, normalized_shape,
                   weight, kAbsent,  0.0,        /*centered=*/false, prenorm};
  call.eps = eps_or_default(eps, call);
  return call;
}

NormResults norm_forward(const NormCall& c) {
  auto [output, sum, mean, rstd] = call_norm_operator<NormForwardOperator>(
      c.input, c.residual, c.input_bias, c.dropout_p, c.seed, c.residual_dtype, c.normalized_shape, c.weight, c.bias,
      c.eps, c.centered, c.wants_sum, c.wants_statistics);
  return {std::move(output), std::move(sum), std::move(mean), std::move(rstd)};
}

NormGradients norm_backward(const NormBackwardCall& c) {
  return call_norm_operator<NormBackwardOperator>(c.grad_output, c.grad_sum, c.sum, c.mean, c.rstd, c.input_bias,
                                                  c.dropout_p, c.seed, c.residual_dtype, c.normalized_shape, c.weight,
                                                  c.bias, c.eps, c.centered, c.output_mask);
}

void norm_out(const NormCall& c, Tensor output, OptionalTensor sum) {
  static const auto op = operator_handle("resnorm::_norm_out", &norm_out_kernel<norm_out_meta>);
  op.call(c.input, c.residual, c.input_bias, c.dropout_p, c.seed, c.residual_dtype, c.normalized_shape, c.weight,
          c.bias, c.eps, c.centered, std::move(output), std::move(sum));
}

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps) {
  return call_norm_operator<LayerNormOperator>(input, normalized_shape, weight, bias, eps);
}

void layer_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, Tensor output) {
  norm_out(norm_call(input, normalized_shape, weight, bias, eps), std::move(output), std::nullopt);
}

Tensor rms_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                std::optional<double> eps) {
  return call_norm_operator<RmsNormOperator>(input, normalized_shape, weight, eps);
}

void rms_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  std::optional<double> eps, Tensor output) {
  norm_out(norm_call(input, normalized_shape, weight, eps), std::move(output), std::nullopt);
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                          double dropout_p, const OptionalTensor& seed, bool prenorm,
                                          std::optional<at::ScalarType> residual_dtype) {
  if (prenorm) {
    return call_norm_operator<AddLayerNormOperator>(input, residual, normalized_shape, weight, bias, eps, input_bias,
                                                    dropout_p, seed, prenorm, residual_dtype);
  }
  auto results = norm_forward(norm_call(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p,
                                        seed, prenorm, residual_dtype));
  return {std::move(results.output), std::move(results.sum)};
}

void add_layer_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                        const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                        std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
  norm_out(norm_call(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                     /*prenorm=*/false, residual_dtype),
           std::move(output), std::move(sum));
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& residual,
                                        c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                        std::optional<double> eps, const OptionalTensor& input_bias, double dropout_p,
                                        const OptionalTensor& seed, bool prenorm,
                                        std::optional<at::ScalarType> residual_dtype) {
  if (prenorm) {
    return call_norm_operator<AddRmsNormOperator>(input, residual, normalized_shape, weight, eps, input_bias, dropout_p,
                                                  seed, prenorm, residual_dtype);
  }
  auto results = norm_forward(
      norm_call(input, residual, normalized_shape, weight, eps, input_bias, dropout_p, seed, prenorm, residual_dtype));
  return {std::move(results.output), std::move(results.sum)};
}

void add_rms_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, std::optional<double> eps, const OptionalTensor& input_bias,
                      double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                      Tensor output, OptionalTensor sum) {
  norm_out(norm_call(input, residual, normalized_shape, weight, eps, input_bias, dropout_p, seed, /*prenorm=*/false,
                     residual_dtype),
           std::move(output), std::move(sum));
}

const char* norm_name(bool adds, bool centered) {
  if (centered) return adds ? "add_layer_norm" : "layer_norm";
  return adds ? "add_rms_norm" : "rms_norm";
}

at::ScalarType norm_sum_dtype(const NormCall& call) {
  return call.residual.has_value() ? sum_dtype(call.input, *call.residual, call.residual_dtype)
                                   : call.input.scalar_type();
}

at::ScalarType norm_accumulation_dtype(const NormCall& call) {
  return accumulation_dtype({call.input.scalar_type(), norm_sum_dtype(call)});
}

NormResults norm_forward_meta(const NormCall& call) {
  check_norm(call);
  const auto options = call.input.options();
  NormResults results{.output = at::empty_symint(call.input.sym_sizes(), options), .sum = {}, .mean = {}, .rstd = {}};
  if (call.wants_sum && call.residual.has_value()) {
    results.sum = at::empty_symint(call.input.sym_sizes(), options.dtype(norm_sum_dtype(call)));
  }
  if (call.wants_statistics) {
    const auto rows = statistics_shape(call.input, call.normalized_shape);
    const auto statistics = options.dtype(norm_accumulation_dtype(call));
    if (call.centered) results.mean = at::empty_symint(rows, statistics);
    results.rstd = at::empty_symint(rows, statistics);
  }
  return results;
}

NormGradients norm_backward_meta(const NormBackwardCall& call) {
  const auto& [grad_output, grad_sum, sum, mean, rstd, input_bias, dropout_p, seed, residual_dtype, shape, weight, bias,
               eps, centered, wanted] = call;
  check_normalized_shape(sum, shape);
  check_dropout(dropout_p, seed, sum);
  check_shape("grad_output", grad_output, sum.sym_sizes());
  if (grad_sum.has_value()) check_shape("grad_sum", *grad_sum, sum.sym_sizes());
  const auto rows = statistics_shape(sum, shape);
  const auto accumulation = accumulation_dtype({grad_output.scalar_type(), sum.scalar_type()});
  TORCH_CHECK(centered == mean.has_value(), "Expected ", centered ? "a mean" : "no mean", " for ",
              norm_name(false, centered), ", but got ", centered ? "None" : "one");
  if (centered) check_out("mean", *mean, rows, accumulation, sum.device());
  check_out("rstd", rstd, rows, accumulation, sum.device());
  check_parameter("weight", weight, shape, grad_output);
  check_wanted("input_bias", wanted[2], input_bias, shape);
  check_wanted("weight", wanted[3], weight, shape);
  check_wanted("bias", wanted[4], bias, shape);
  return {empty_gradient_like(sum, grad_output.scalar_type(), wanted[0]),
          empty_gradient_like(sum, residual_dtype, wanted[1]), empty_gradient_like(input_bias, wanted[2]),
          empty_gradient_like(weight, wanted[3]), empty_gradient_like(bias, wanted[4])};
}

void norm_out_meta(const NormCall& call, const Tensor& output, const OptionalTensor& sum) {
  check_norm(call);
  const auto sizes = call.input.sym_sizes();
  check_out("out", output, sizes, call.input.scalar_type(), call.input.device());
  TORCH_CHECK(!sum.has_value() || call.residual.has_value(), "Expected a residual beside the sum's out, but got None");
  if (sum.has_value()) check_out("the sum's out", *sum, sizes, norm_sum_dtype(call), call.input.device());
}

void check_norm_overlap(const NormCall& call, const Tensor& output, const OptionalTensor& sum) {
  const auto& read = call.residual.has_value() ? *call.residual : call.input;
  check_overlap(output, {call.input, read}, {call.weight, call.bias, call.input_bias, call.seed, sum});
  if (sum.has_value()) check_overlap(*sum, {call.input, read}, {call.weight, call.bias, call.input_bias, call.seed});
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) "
      "-> Tensor",
      tags);
  m.def("rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor", tags);
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, "
      "Tensor? bias=None, float eps=1e-05, Tensor? input_bias=None, float dropout_p=0.0, Tensor? seed=None, "
      "bool prenorm=False, ScalarType? residual_dtype=None) -> (Tensor output, Tensor sum)",
      tags);
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, "
      "Tensor? input_bias=None, float dropout_p=0.0, Tensor? seed=None, bool prenorm=False, "
      "ScalarType? residual_dtype=None) -> (Tensor output, Tensor sum)",
      tags);

  // In terms of _norm_out on every device and in every graph.
  m.def(
      "layer_norm_out(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) output) -> ()",
      layer_norm_out, tags);
  m.def("rms_norm_out(Tensor input, SymInt[] normalized_shape, Tensor? weight, float? eps, Tensor(a!) output) -> ()",
        rms_norm_out, tags);
  m.def(
      "add_layer_norm_out(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
      "float eps, Tensor? input_bias, float dropout_p, Tensor? seed, ScalarType? residual_dtype, Tensor(a!) output, "
      "Tensor(b!)? sum) -> ()",
      add_layer_norm_out, tags);
  m.def(
      "add_rms_norm_out(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float? eps, "
      "Tensor? input_bias, float dropout_p, Tensor? seed, ScalarType? residual_dtype, Tensor(a!) output, "
      "Tensor(b!)? sum) -> ()",
      add_rms_norm_out, tags);

  m.def(
      "_norm_forward(Tensor input, Tensor? residual, Tensor? input_bias, float dropout_p, Tensor? seed, "
      "ScalarType? residual_dtype, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, bool centered, "
      "bool wants_sum, bool wants_statistics) -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)",
      tags);
  m.def(
      "_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? mean, Tensor rstd, "
      "Tensor? input_bias, float dropout_p, Tensor? seed, ScalarType residual_dtype, SymInt[] normalized_shape, "
      "Tensor? weight, Tensor? bias, float eps, bool centered, bool[5] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "_norm_out(Tensor input, Tensor? residual, Tensor? input_bias, float dropout_p, Tensor? seed, "
      "ScalarType? residual_dtype, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, bool centered, "
      "Tensor(a!) output, Tensor(b!)? sum) -> ()",
      tags);
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) { implement_norms<norm_forward_meta, norm_backward_meta, norm_out_meta>(m); }

// As torch has it for its own norms: in float32 on CUDA; on the CPU autocast leaves them alone.
TORCH_LIBRARY_IMPL(resnorm, AutocastCUDA, m) {
  m.impl("layer_norm", NormAutocast<LayerNormOperator>::kernel);
  m.impl("rms_norm", NormAutocast<RmsNormOperator>::kernel);
  m.impl("add_layer_norm", NormAutocast<AddLayerNormOperator>::kernel);
  m.impl("add_rms_norm", NormAutocast<AddRmsNormOperator>::kernel);
  m.impl("_norm_forward", NormAutocast<NormForwardOperator>::kernel);
}

}  // namespace resnorm
