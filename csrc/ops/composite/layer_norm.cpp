// SPDX-License-Identifier: BSD-3-Clause
#include "layer_norm.h"

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "../overlap.h"
#include "materialized.h"

namespace resnorm::composite {

namespace {

// (input - mean) * rstd, and the statistics with the row's dimensions kept.
struct NormalizedRows {
  Tensor values, mean, rstd;
};

Tensor row_mean(const Tensor& tensor, size_t row_dims) {
  std::vector<int64_t> dims(row_dims);
  for (size_t i = 0; i < row_dims; ++i) dims[i] = -static_cast<int64_t>(i) - 1;
  return tensor.mean(dims, /*keepdim=*/true);
}

NormalizedRows normalize_rows(const Tensor& input, size_t row_dims, double eps) {
  const auto rounded_mean = row_mean(input, row_dims);
  const auto deviations = input - rounded_mean;
  const auto delta = row_mean(deviations, row_dims);  // what rounding left in the mean
  const auto mean = rounded_mean + delta, centered = deviations - delta;
  const auto rstd = (row_mean(centered.square(), row_dims) + eps).rsqrt();
  return {centered * rstd, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      double eps) {
  layer_norm_forward_meta(input, normalized_shape, weight, bias, eps);
  const auto dtype = input.scalar_type();
  auto [output, mean, rstd] = normalize(input.to(accumulation_dtype({dtype})), normalized_shape, weight, bias, eps);
  return {output.to(dtype), std::move(mean), std::move(rstd)};
}

void layer_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, Tensor output) {
  layer_norm_out_meta(input, normalized_shape, weight, bias, eps, output);
  check_overlap(output, {input}, {weight, bias});
  output.copy_(layer_norm(input, normalized_shape, weight, bias, eps));
}

}  // namespace

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps) {
  return std::get<0>(layer_norm_forward(input, normalized_shape, weight, bias, eps));
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const Tensor& mean, const Tensor& rstd, double eps,
                                                       std::array<bool, 3> output_mask) {
  layer_norm_backward_meta(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps, output_mask);
  const auto dtype = input.scalar_type(), accumulation = accumulation_dtype({dtype});
  const auto gradients =
      normalize_backward(grad_output.to(accumulation), input.to(accumulation), normalized_shape, weight, eps);
  return {
      requested_gradient(output_mask[0], gradients.input, dtype, input),
      requested_gradient(output_mask[1], gradients.weight, weight.has_value() ? weight->scalar_type() : dtype, input),
      requested_gradient(output_mask[2], gradients.bias, bias.has_value() ? bias->scalar_type() : dtype, input)};
}

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                             const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const auto convert = [&](const OptionalTensor& parameter) {
    return parameter.has_value() ? OptionalTensor(parameter->to(input.scalar_type())) : std::nullopt;
  };
  const auto rows = input.sym_sizes().slice(0, input.dim() - normalized_shape.size());
  auto [output, mean, rstd] = normalize_rows(input, normalized_shape.size(), eps);
  if (weight.has_value()) output = output * *convert(weight);
  if (bias.has_value()) output = output + *convert(bias);
  return {std::move(output), mean.reshape_symint(rows), rstd.reshape_symint(rows)};
}

NormalizeGradients normalize_backward(const Tensor& grad_output, const Tensor& input,
                                      c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, double eps) {
  const auto row_dims = normalized_shape.size();
  const auto [normalized, mean, rstd] = normalize_rows(input, row_dims, eps);
  const auto grad_normalized = weight.has_value() ? grad_output * weight->to(input.scalar_type()) : grad_output;
  const auto grad_input = rstd * (grad_normalized - row_mean(grad_normalized, row_dims) -
                                  normalized * row_mean(grad_normalized * normalized, row_dims));
  return {grad_input, (grad_output * normalized).sum_to_size_symint(normalized_shape),
          grad_output.sum_to_size_symint(normalized_shape)};
}

Tensor requested_gradient(bool wanted, const Tensor& gradient, at::ScalarType dtype, const Tensor& like) {
  return wanted ? gradient.to(dtype) : unused_result(like);
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  m.impl("layer_norm", Materialized<layer_norm_meta, layer_norm>::kernel);
  m.impl("layer_norm_out", layer_norm_out);
  m.impl("_layer_norm_forward", Materialized<layer_norm_forward_meta, layer_norm_forward>::kernel);
  m.impl("_layer_norm_backward", Materialized<layer_norm_backward_meta, layer_norm_backward>::kernel);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_out", layer_norm_out);
  m.impl("_layer_norm_forward", layer_norm_forward);
  m.impl("_layer_norm_backward", layer_norm_backward);
}

}  // namespace resnorm::composite
