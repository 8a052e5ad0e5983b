// SPDX-License-Identifier: BSD-3-Clause
#include "layer_weights.h"

namespace resnorm::engine {

namespace {

Tensor prepacked_weight(const Tensor& weight, const OptionalTensor& bias, const LinearBackend& backend) {
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 2 && weight.is_cpu() && backend.supports(dtype),
              "Expected a weight of shape (out_features, in_features) on the CPU, of a dtype that ", backend.name,
              " multiplies, but got weight of shape ", weight.sizes(), " of ", dtype, " on ", weight.device());
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_cpu() &&
                                    bias->scalar_type() == dtype),
              "Expected bias of shape [", weight.size(0), "] of ", dtype, " on the CPU, but got bias of shape ",
              bias->sizes(), " of ", bias->scalar_type(), " on ", bias->device());
  return backend.prepack(weight.resolve_neg());
}

}  // namespace

PreparedLinear::PreparedLinear(const Tensor& weight, const OptionalTensor& bias, const LinearBackend& backend)
    : weight(prepacked_weight(weight, bias, backend)),
      bias(bias.has_value() ? OptionalTensor(bias->resolve_neg()) : std::nullopt),
      backend(&backend),
      in_features(weight.size(1)),
      out_features(weight.size(0)) {}

Tensor PreparedLinear::operator()(const Tensor& input, Activation activation) const {
  check_input(input);
  return engine::multiply(*backend, input.resolve_neg(), weight, bias, activation, out_features);
}

Tensor PreparedLinear::multiply(const Tensor& input, const Tensor& memory, Activation activation) const {
  check_input(input);
  TORCH_CHECK(memory.size(1) == out_features, "Expected a linear layer of ", memory.size(1),
              " output features, but got one of ", out_features);
  return backend->multiply(input, weight, bias, activation, out_features, memory);
}

void PreparedLinear::check_input(const Tensor& input) const {
  TORCH_CHECK(input.dim() > 0 && input.size(-1) == in_features && input.scalar_type() == weight.scalar_type() &&
                  input.is_cpu() && input.layout() == at::kStrided && !input._is_zerotensor(),
              "Expected input of shape (*, ", in_features, ") of ", weight.scalar_type(),
              ", as the weight is, dense and on the CPU, but got input of shape ", input.sizes(), " of ",
              input.scalar_type(), " on ", input.device());
}

}  // namespace resnorm::engine
