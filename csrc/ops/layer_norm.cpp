// SPDX-License-Identifier: BSD-3-Clause
#include "layer_norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "operator_handle.h"

namespace resnorm {

namespace {

void check_layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias) {
  check_normalized_shape(input, normalized_shape);
  check_floating("layer_norm", input);
  check_parameter("weight", weight, normalized_shape, input);
  check_parameter("bias", bias, normalized_shape, input);
}

}  // namespace

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps) {
  static const auto op = operator_handle("resnorm::layer_norm", &layer_norm);
  return op.call(input, normalized_shape, weight, bias, eps);
}

void layer_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, Tensor output) {
  static const auto op = operator_handle("resnorm::layer_norm_out", &layer_norm_out);
  op.call(input, normalized_shape, weight, bias, eps, std::move(output));
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      double eps) {
  static const auto op = operator_handle("resnorm::_layer_norm_forward", &layer_norm_forward);
  return op.call(input, normalized_shape, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const Tensor& mean, const Tensor& rstd, double eps,
                                                       std::array<bool, 3> output_mask) {
  static const auto op = operator_handle("resnorm::_layer_norm_backward", &layer_norm_backward);
  return op.call(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps, output_mask);
}

Tensor layer_norm_meta(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double /*eps*/) {
  check_layer_norm(input, normalized_shape, weight, bias);
  return at::empty_symint(input.sym_sizes(), input.options());
}

void layer_norm_out_meta(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                         const OptionalTensor& bias, double /*eps*/, Tensor output) {
  check_layer_norm(input, normalized_shape, weight, bias);
  check_out("out", output, input.sym_sizes(), input.scalar_type(), input.device());
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_meta(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps) {
  auto output = layer_norm_meta(input, normalized_shape, weight, bias, eps);
  auto [mean, rstd] = empty_statistics(input, normalized_shape, accumulation_dtype({input.scalar_type()}));
  return {std::move(output), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                            c10::SymIntArrayRef normalized_shape,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const Tensor& mean, const Tensor& rstd, double /*eps*/,
                                                            std::array<bool, 3> output_mask) {
  check_layer_norm(input, normalized_shape, weight, bias);
  check_shape("grad_output", grad_output, input.sym_sizes());
  check_statistics(mean, rstd, input, normalized_shape, accumulation_dtype({input.scalar_type()}));
  check_wanted("weight", output_mask[1], weight, normalized_shape);
  check_wanted("bias", output_mask[2], bias, normalized_shape);
  return {output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : unused_result(input),
          empty_gradient_like(weight, output_mask[1], input), empty_gradient_like(bias, output_mask[2], input)};
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "layer_norm_out(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) output) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_layer_norm_forward(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor output, Tensor mean, Tensor rstd)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_layer_norm_backward(Tensor grad_output, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor rstd, float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) {
  m.impl("layer_norm", layer_norm_meta);
  m.impl("layer_norm_out", layer_norm_out_meta);
  m.impl("_layer_norm_forward", layer_norm_forward_meta);
  m.impl("_layer_norm_backward", layer_norm_backward_meta);
}

}  // namespace resnorm
