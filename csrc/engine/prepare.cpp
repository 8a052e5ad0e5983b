// SPDX-License-Identifier: BSD-3-Clause
#include "prepare.h"

#include <ATen/ops/cat.h>

#include <algorithm>

#include "linear/choice.h"

namespace resnorm::engine {

namespace {

// Detached, so that nothing that is kept refers to a parameter.
Tensor as_dtype(const Tensor& tensor, at::ScalarType dtype) { return tensor.detach().resolve_neg().to(dtype); }

Tensor joined(const std::vector<Tensor>& tensors) { return tensors.size() == 1 ? tensors.front() : at::cat(tensors); }

Norm prepare_norm(const NormParameters& parameters, double eps, at::ScalarType dtype) {
  const auto prepared = [&](const OptionalTensor& parameter) -> OptionalTensor {
    if (!parameter.has_value()) return std::nullopt;
    // Half-precision ones may come to be read as float32; float32 ones may stand beside a half.
    return as_dtype(*parameter, dtype == at::kFloat ? dtype : parameter->scalar_type());
  };
  return {prepared(parameters.weight), prepared(parameters.bias), eps};
}

}  // namespace

LayerParameters layer_parameters(c10::ArrayRef<OptionalTensor> tensors) {
  const auto* next = tensors.begin();
  const auto linear = [&](int64_t count) {
    LinearParameters result;
    for (int64_t i = 0; i < count; ++i) {
      const auto& weight = *next++;
      TORCH_CHECK(weight.has_value(), "Expected weights of all linear layers, but got None");
      result.weights.push_back(*weight);
      result.biases.push_back(*next++);
    }
    return result;
  };
  const auto norm = [&] {
    NormParameters result{next[0], next[1]};
    next += 2;
    return result;
  };
  TORCH_CHECK(tensors.size() == kJoinedParameters || tensors.size() == kSeparateParameters, "Expected ",
              kJoinedParameters, " or ", kSeparateParameters, " parameters of a layer, but got ", tensors.size());
  LayerParameters layer;
  layer.projections = linear(tensors.size() == kJoinedParameters ? 1 : 3);
  layer.attention_output = linear(1);
  layer.attention_norm = norm();
  layer.intermediate = linear(1);
  layer.output = linear(1);
  layer.feed_forward_norm = norm();
  return layer;
}

PreparedLinear prepare_linear(const LinearParameters& parameters, bool transposed, at::ScalarType dtype) {
  std::vector<Tensor> weights, biases;
  for (const auto& weight : parameters.weights) {
    weights.push_back(transposed ? as_dtype(weight, dtype).t() : as_dtype(weight, dtype));
  }
  for (const auto& bias : parameters.biases) {
    if (bias.has_value()) biases.push_back(as_dtype(*bias, dtype));
  }
  TORCH_CHECK(biases.empty() || biases.size() == weights.size(),
              "Expected biases for all of the linear layers that lie side by side or for none, but got ", biases.size(),
              " for ", weights.size());
  const auto weight = joined(weights);
  // Where torch counts no versions nothing is kept: not worth prepacking for one call.
  const bool kept = std::none_of(parameters.weights.begin(), parameters.weights.end(),
                                 [](const Tensor& each) { return each.is_inference(); });
  const auto& backend = weight.dim() != 2 ? aten  // which PreparedLinear refuses
                        : kept            ? linear_backend(dtype, weight.size(1), weight.size(0))
                                          : unpacked_backend(weight);
  return {weight, biases.empty() ? OptionalTensor() : joined(biases), backend};
}

std::shared_ptr<LayerWeights> prepare_layer(const LayerParameters& parameters, const LayerOptions& options,
                                            Precision precision) {
  const auto linear = [&](const LinearParameters& each) {
    return prepare_linear(each, options.transposed, precision.products);
  };
  auto qkv = linear(parameters.projections);
  TORCH_CHECK(options.head_dim > 0 && qkv.out_features > 0 && qkv.out_features % (3 * options.head_dim) == 0,
              "Expected projections of queries, keys and values of whole heads of ", options.head_dim,
              " features, but got ", qkv.out_features, " features in all");
  const auto num_heads = qkv.out_features / (3 * options.head_dim);
  return std::make_shared<LayerWeights>(
      LayerWeights{num_heads, options.scale, std::move(qkv), linear(parameters.attention_output),
                   prepare_norm(parameters.attention_norm, options.attention_eps, precision.stream),
                   linear(parameters.intermediate), options.activation, linear(parameters.output),
                   prepare_norm(parameters.feed_forward_norm, options.feed_forward_eps, precision.stream)});
}

}  // namespace resnorm::engine
