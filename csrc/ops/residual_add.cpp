// SPDX-License-Identifier: BSD-3-Clause
#include "residual_add.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "support/operator_handle.h"

namespace resnorm {

namespace {

// What add_layer_norm's input_bias, whose backward pass this is too, must have: as many of the last dimensions as it
// has.
c10::SymIntArrayRef trailing_shape(const Tensor& tensor, const OptionalTensor& input_bias) {
  const auto sizes = tensor.sym_sizes();
  const auto dims = input_bias.has_value() ? static_cast<size_t>(input_bias->dim()) : 0;
  return sizes.slice(sizes.size() - std::min(dims, sizes.size()));
}

void check_residual_add(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                        const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  check_floating("residual_add", input);
  check_residual("residual_add", input, residual, residual_dtype);
  check_parameter("input_bias", input_bias, row_shape(input), input);
  check_dropout(dropout_p, seed, input);
}

}  // namespace

Tensor residual_add(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  static const auto op = operator_handle("resnorm::residual_add", &residual_add);
  return op.call(input, residual, input_bias, dropout_p, seed, residual_dtype);
}

void residual_add_out(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                      const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype, Tensor output) {
  static const auto op = operator_handle("resnorm::residual_add_out", &residual_add_out);
  op.call(input, residual, input_bias, dropout_p, seed, residual_dtype, std::move(output));
}

std::tuple<Tensor, Tensor> residual_add_backward(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                 double dropout_p, const OptionalTensor& seed,
                                                 at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  static const auto op = operator_handle("resnorm::_residual_add_backward", &residual_add_backward);
  return op.call(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
}

Tensor residual_add_meta(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                         double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  check_residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype);
  return at::empty_symint(input.sym_sizes(), input.options().dtype(sum_dtype(input, residual, residual_dtype)));
}

void residual_add_out_meta(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                           double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                           Tensor output) {
  check_residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype);
  check_out("out", output, input.sym_sizes(), sum_dtype(input, residual, residual_dtype), input.device());
}

std::tuple<Tensor, Tensor> residual_add_backward_meta(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                      double dropout_p, const OptionalTensor& seed,
                                                      at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  check_dropout(dropout_p, seed, grad_output);
  check_wanted("input_bias", output_mask[1], input_bias, trailing_shape(grad_output, input_bias));
  return {empty_gradient_like(grad_output, input_dtype, output_mask[0]),
          empty_gradient_like(input_bias, output_mask[1])};
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "residual_add(Tensor input, Tensor residual, Tensor? input_bias=None, float dropout_p=0.0, Tensor? seed=None, "
      "ScalarType? residual_dtype=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "residual_add_out(Tensor input, Tensor residual, Tensor? input_bias, float dropout_p, Tensor? seed, "
      "ScalarType? residual_dtype, Tensor(a!) output) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_residual_add_backward(Tensor grad_output, Tensor? input_bias, float dropout_p, Tensor? seed, "
      "ScalarType input_dtype, bool[2] output_mask) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) {
  m.impl("residual_add", residual_add_meta);
  m.impl("residual_add_out", residual_add_out_meta);
  m.impl("_residual_add_backward", residual_add_backward_meta);
}

}  // namespace resnorm
