// SPDX-License-Identifier: BSD-3-Clause
#include "norm_composite.h"

#include <ATen/TensorOperators.h>

#include "norm_operators.h"
#include "residual_add_composite.h"
#include "support/materialized.h"
#include "support/philox.h"

namespace resnorm::composite {

namespace {

// (sum - mean) * rstd, and the statistics with the row's dimensions kept; no mean where not centered.
struct NormalizedRows {
  Tensor values, mean, rstd;
};

Tensor row_mean(const Tensor& tensor, size_t row_dims) {
  std::vector<int64_t> dims(row_dims);
  for (size_t i = 0; i < row_dims; ++i) dims[i] = -static_cast<int64_t>(i) - 1;
  return tensor.mean(dims, /*keepdim=*/true);
}

NormalizedRows normalize_rows(const Tensor& sum, size_t row_dims, double eps, bool centered) {
  const auto reciprocal_deviation = [&](const Tensor& values) {
    return (row_mean(values.square(), row_dims) + eps).rsqrt();
  };
  if (!centered) {
    const auto rstd = reciprocal_deviation(sum);
    return {sum * rstd, Tensor(), rstd};
  }
  const auto rounded_mean = row_mean(sum, row_dims);
  const auto deviations = sum - rounded_mean;
  const auto delta = row_mean(deviations, row_dims);  // what rounding left in the mean
  const auto mean = rounded_mean + delta, deviation = deviations - delta;
  const auto rstd = reciprocal_deviation(deviation);
  return {deviation * rstd, mean, rstd};
}

void norm_out(const NormCall& call, const Tensor& output, const OptionalTensor& sum) {
  norm_out_meta(call, output, sum);
  check_norm_overlap(call, output, sum);
  const auto results = composite::norm_forward(call);
  output.copy_(results.output);
  if (sum.has_value()) sum->copy_(results.sum);
}

NormResults materialized_forward(const NormCall& call) {
  auto results = norm_forward_meta(call);
  const auto computed = composite::norm_forward(call);
  results.output.copy_(computed.output);
  if (results.sum.defined()) results.sum.copy_(computed.sum);
  if (results.mean.defined()) results.mean.copy_(computed.mean);
  if (results.rstd.defined()) results.rstd.copy_(computed.rstd);
  return results;
}

}  // namespace

NormResults norm_forward(const NormCall& call) {
  norm_forward_meta(call);
  const auto accumulation = norm_accumulation_dtype(call);
  const auto sum = call.residual.has_value() ? exact_sum(call.input, *call.residual, call.input_bias, call.dropout_p,
                                                         call.seed, norm_sum_dtype(call))
                                             : call.input;
  auto [output, mean, rstd] =
      normalize_rows(sum.to(accumulation), call.normalized_shape.size(), call.eps, call.centered);
  if (call.weight.has_value()) output = output * call.weight->to(accumulation);
  if (call.bias.has_value()) output = output + call.bias->to(accumulation);
  const auto rows = statistics_shape(call.input, call.normalized_shape);
  return {output.to(call.input.scalar_type()), call.residual.has_value() ? sum.to(norm_sum_dtype(call)) : Tensor(),
          call.centered ? mean.reshape_symint(rows) : Tensor(), rstd.reshape_symint(rows)};
}

NormGradients norm_backward(const NormBackwardCall& call) {
  norm_backward_meta(call);
  const auto accumulation = call.rstd.scalar_type();
  const auto row_dims = call.normalized_shape.size();
  const auto grad_output = call.grad_output.to(accumulation);
  const auto [normalized, mean, rstd] = normalize_rows(call.sum.to(accumulation), row_dims, call.eps, call.centered);
  const auto weighted = call.weight.has_value() ? grad_output * call.weight->to(accumulation) : grad_output;
  auto along = weighted - normalized * row_mean(weighted * normalized, row_dims);
  if (call.centered) along = along - row_mean(weighted, row_dims);
  auto grad_sum = rstd * along;
  if (call.grad_sum.has_value()) grad_sum = grad_sum + call.grad_sum->to(accumulation);
  const auto grad_input = dropout(grad_sum, call.dropout_p, call.seed);
  const auto& wanted = call.output_mask;
  return {wanted[0] ? grad_input.to(call.grad_output.scalar_type()) : Tensor(),
          wanted[1] ? grad_sum.to(call.residual_dtype) : Tensor(),
          parameter_gradient(wanted[2], grad_input, call.input_bias),
          parameter_gradient(wanted[3], grad_output * normalized, call.weight),
          parameter_gradient(wanted[4], grad_output, call.bias)};
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  implement_norms<materialized_forward, Materialized<norm_backward_meta, norm_backward>::kernel, norm_out>(m);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) { implement_norms<norm_forward, norm_backward, norm_out>(m); }

}  // namespace resnorm::composite
