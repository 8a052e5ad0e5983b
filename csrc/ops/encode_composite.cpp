// SPDX-License-Identifier: BSD-3-Clause
#include "encode_composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "activation_composite.h"

namespace resnorm::composite {

namespace {

using engine::LinearParameters;

Tensor linear(const Tensor& input, const LinearParameters& parameters) {
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < parameters.weights.size(); ++i) {
    outputs.push_back(at::linear(input, parameters.weights[i], parameters.biases[i]));
  }
  return outputs.size() == 1 ? outputs.front() : at::cat(outputs, -1);
}

// In the parameters' dtype where that is wider, as the operators of the norms do.
Tensor layer_norm(const Tensor& input, const engine::NormParameters& norm, double eps) {
  auto dtype = input.scalar_type();
  for (const auto* parameter : {&norm.weight, &norm.bias}) {
    if (parameter->has_value()) dtype = c10::promoteTypes(dtype, (*parameter)->scalar_type());
  }
  const auto cast = [&](const OptionalTensor& parameter) {
    return parameter.has_value() ? OptionalTensor(parameter->to(dtype)) : std::nullopt;
  };
  return at::layer_norm_symint(input.to(dtype), {input.sym_size(-1)}, cast(norm.weight), cast(norm.bias), eps)
      .to(input.scalar_type());
}

// What attention adds no weight to is False; undefined where it sees everything.
OptionalTensor attention_mask(const EncodeCall& call) {
  OptionalTensor mask;
  if (call.key_mask.has_value()) mask = call.key_mask->unsqueeze(1).unsqueeze(1);
  if (call.causal) {
    const auto length = call.input.sym_size(1);
    const auto past = at::ones_symint({length, length}, call.input.options().dtype(at::kBool)).tril();
    mask = mask.has_value() ? mask->logical_and(past) : past;
  }
  return mask;
}

Tensor attend(const Tensor& x, const engine::LayerParameters& layer, const EncodeCall& call,
              const OptionalTensor& mask) {
  const auto qkv = linear(x, layer.projections);
  const auto heads_first = qkv.unflatten_symint(-1, {3, -1, call.options.head_dim}).permute({2, 0, 3, 1, 4});  // a view
  const auto context =
      at::scaled_dot_product_attention(heads_first.select(0, 0), heads_first.select(0, 1), heads_first.select(0, 2),
                                       mask, 0.0, /*is_causal=*/false, call.options.scale);
  return linear(context.transpose(1, 2).flatten(-2), layer.attention_output);
}

Tensor feed_forward(const Tensor& x, const engine::LayerParameters& layer, const EncodeCall& call) {
  return linear(activate(call.options.activation, linear(x, layer.intermediate)), layer.output);
}

// By tensors, so that nothing depends on their values.
Tensor with_zeros_at_padding(const Tensor& x, const EncodeCall& call) {
  if (!call.key_mask.has_value() || call.input.sym_size(1) == 0) return x;
  const auto& seen = *call.key_mask;
  auto kept = seen;
  if (call.padding == Padding::kSkipUnlessFirst) {
    kept = seen.logical_or(seen.narrow(1, 0, 1).all().logical_not());
  } else if (call.padding == Padding::kSkipIfTrailing) {
    const auto later = seen.narrow_symint(1, 1, seen.sym_size(1) - 1);
    const auto earlier = seen.narrow_symint(1, 0, seen.sym_size(1) - 1);
    kept = seen.logical_or(later.logical_and(earlier.logical_not()).any());
  }
  return at::where(kept.unsqueeze(-1), x, 0.0);
}

Tensor encode_operator(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                       int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                       bool norm_first, bool causal, c10::string_view padding,
                       std::optional<at::ScalarType> /*product_dtype*/) {
  return encode(encode_call(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation, norm_first,
                            causal, padding));
}

}  // namespace

Tensor encode(const EncodeCall& call) {
  const auto mask = attention_mask(call);
  const auto& [head_dim, scale, attention_eps, feed_forward_eps, activation, transposed] = call.options;
  auto x = call.input;
  for (const auto& layer : call.layers) {
    if (call.norm_first) {
      x = x + attend(layer_norm(x, layer.attention_norm, attention_eps), layer, call, mask);
      x = x + feed_forward(layer_norm(x, layer.feed_forward_norm, feed_forward_eps), layer, call);
    } else {
      x = layer_norm(x + attend(x, layer, call, mask), layer.attention_norm, attention_eps);
      x = layer_norm(x + feed_forward(x, layer, call), layer.feed_forward_norm, feed_forward_eps);
    }
  }
  return with_zeros_at_padding(x, call).to(call.input.scalar_type());  // autocast may have given another
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) { m.impl("encode", encode_operator); }

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) { m.impl("encode", encode_operator); }

}  // namespace resnorm::composite
