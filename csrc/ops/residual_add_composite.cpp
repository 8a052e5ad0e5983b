// SPDX-License-Identifier: BSD-3-Clause
#include "residual_add_composite.h"

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "support/materialized.h"
#include "support/overlap.h"
#include "support/philox.h"

namespace resnorm::composite {

namespace {

void residual_add_out(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                      const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype, Tensor output) {
  residual_add_out_meta(input, residual, input_bias, dropout_p, seed, residual_dtype, output);
  check_overlap(output, {input, residual}, {input_bias, seed});
  output.copy_(residual_add(input, residual, input_bias, dropout_p, seed, residual_dtype));
}

}  // namespace

Tensor exact_sum(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                 const OptionalTensor& seed, at::ScalarType sum_dtype) {
  const auto accumulation = accumulation_dtype({input.scalar_type(), residual.scalar_type(), sum_dtype});
  auto update = input.to(accumulation);
  if (input_bias.has_value()) update = update + input_bias->to(accumulation);
  return residual.to(accumulation) + dropout(update, dropout_p, seed);
}

Tensor residual_add(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
  residual_add_meta(input, residual, input_bias, dropout_p, seed, residual_dtype);
  const auto dtype = sum_dtype(input, residual, residual_dtype);
  return exact_sum(input, residual, input_bias, dropout_p, seed, dtype).to(dtype);
}

std::tuple<Tensor, Tensor> residual_add_backward(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                 double dropout_p, const OptionalTensor& seed,
                                                 at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  residual_add_backward_meta(grad_output, input_bias, dropout_p, seed, input_dtype, output_mask);
  const auto accumulation = accumulation_dtype({grad_output.scalar_type(), input_dtype});
  const auto grad_input = dropout(grad_output.to(accumulation), dropout_p, seed);
  return {output_mask[0] ? grad_input.to(input_dtype) : Tensor(),
          parameter_gradient(output_mask[1], grad_input, input_bias)};
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  m.impl("residual_add", Materialized<residual_add_meta, residual_add>::kernel);
  m.impl("residual_add_out", residual_add_out);
  m.impl("_residual_add_backward", Materialized<residual_add_backward_meta, residual_add_backward>::kernel);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) {
  m.impl("residual_add", residual_add);
  m.impl("residual_add_out", residual_add_out);
  m.impl("_residual_add_backward", residual_add_backward);
}

}  // namespace resnorm::composite
