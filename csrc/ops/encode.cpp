// SPDX-License-Identifier: BSD-3-Clause
#include "encode.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "support/operator_handle.h"

namespace resnorm {

namespace {

using engine::LinearParameters;
using engine::NormParameters;

Padding parse_padding(c10::string_view name) {
  if (name == "skip") return Padding::kSkip;
  if (name == "skip_unless_first") return Padding::kSkipUnlessFirst;
  if (name == "skip_if_trailing") return Padding::kSkipIfTrailing;
  TORCH_CHECK_VALUE(false, "Expected padding to be skip, skip_unless_first or skip_if_trailing, but got ", name);
}

// The parameters of one layer, held to an input.
class LayerCheck {
 public:
  LayerCheck(const Tensor& input, int64_t layer) : input_(input), layer_(layer) {}

  // Returns the output features.
  c10::SymInt linear(const char* name, const LinearParameters& linear, const c10::SymInt& in_features) const {
    c10::SymInt out_features = 0;
    for (size_t i = 0; i < linear.weights.size(); ++i) {
      const auto& weight = linear.weights[i];
      TORCH_CHECK(weight.dim() == 2 && weight.sym_size(1) == in_features, "Expected the weight of ", name, " of layer ",
                  layer_, " to be of shape (out_features, ", in_features, "), but got ", weight.sym_sizes());
      check_like_input(name, weight);
      const auto& bias = linear.biases[i];
      TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)),
                  "Expected the bias of ", name, " of layer ", layer_, " to be of shape [", weight.sym_size(0),
                  "], but got ", bias.has_value() ? bias->sym_sizes() : c10::SymIntArrayRef());
      if (bias.has_value()) check_like_input(name, *bias);
      TORCH_CHECK(bias.has_value() == linear.biases.front().has_value(),
                  "Expected biases for all projections of layer ", layer_, " or for none");
      out_features += weight.sym_size(0);
    }
    return out_features;
  }

  // The same for one whose output is added to the input.
  void update(const char* name, const LinearParameters& linear_parameters, const c10::SymInt& in_features) const {
    const auto out_features = linear(name, linear_parameters, in_features);
    TORCH_CHECK(out_features == input_.sym_size(2), "Expected ", name, " of layer ", layer_, " to have ",
                input_.sym_size(2), " output features, as the input has, but got ", out_features);
  }

  void norm(const NormParameters& norm) const {
    const auto shape = input_.sym_sizes().slice(2);
    check_parameter("a norm's weight", norm.weight, shape, input_);
    check_parameter("a norm's bias", norm.bias, shape, input_);
  }

  // Queries, keys and values: returns the features of each.
  c10::SymInt projections(const LinearParameters& parameters, int64_t head_dim) const {
    const auto features = linear("a projection", parameters, input_.sym_size(2));
    for (const auto& weight : parameters.weights) {
      TORCH_CHECK(weight.sym_size(0) * static_cast<int64_t>(parameters.weights.size()) == features,
                  "Expected as many queries, keys and values in layer ", layer_, ", but got projections of ",
                  parameters.weights.front().sym_size(0), " and ", weight.sym_size(0), " features");
    }
    TORCH_CHECK(features % (3 * head_dim) == 0 && features > 0, "Expected whole heads of ", head_dim,
                " features each in layer ", layer_, ", but got ", features, " features of queries, keys and values");
    return features / 3;
  }

 private:
  void check_like_input(const char* name, const Tensor& tensor) const {
    TORCH_CHECK(tensor.scalar_type() == input_.scalar_type() && tensor.device() == input_.device(),
                "Expected the parameters of ", name, " of layer ", layer_, " to be ", input_.scalar_type(), " on ",
                input_.device(), ", as the input is, but got ", tensor.scalar_type(), " on ", tensor.device());
  }

  const Tensor& input_;
  int64_t layer_;
};

void check_layer(const Tensor& input, const engine::LayerParameters& layer, int64_t index, int64_t head_dim) {
  const LayerCheck check(input, index);
  check.update("the attention's output", layer.attention_output, check.projections(layer.projections, head_dim));
  check.norm(layer.attention_norm);
  check.update("the feed-forward's output", layer.output,
               check.linear("the feed-forward's input", layer.intermediate, input.sym_size(2)));
  check.norm(layer.feed_forward_norm);
}

Tensor encode_meta(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                   int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                   bool norm_first, bool causal, c10::string_view padding,
                   std::optional<at::ScalarType> /*product_dtype*/) {
  encode_call(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation, norm_first, causal, padding);
  return at::empty_symint(input.sym_sizes(), input.options());
}

}  // namespace

EncodeCall encode_call(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                       int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                       bool norm_first, bool causal, c10::string_view padding) {
  check_floating("encode", input);
  TORCH_CHECK(input.dim() == 3, "Expected input of shape (batch, length, dim), but got ", input.sym_sizes());
  if (key_mask.has_value()) {
    TORCH_CHECK(key_mask->scalar_type() == at::kBool && key_mask->device() == input.device(),
                "Expected key_mask of dtype Bool on ", input.device(), ", the input's device, but got ",
                key_mask->scalar_type(), " on ", key_mask->device());
    check_shape("key_mask", *key_mask, input.sym_sizes().slice(0, 2));
  }
  const auto count = static_cast<int64_t>(parameters.size());
  const bool joined = count == num_layers * engine::kJoinedParameters;
  TORCH_CHECK(num_layers > 0 && (joined || count == num_layers * engine::kSeparateParameters), "Expected ",
              engine::kJoinedParameters, " or ", engine::kSeparateParameters,
              " parameters for each of at least one layer, but got ", count, " for ", num_layers, " layers");
  TORCH_CHECK_VALUE(head_dim > 0, "Expected head_dim > 0, but got ", head_dim);
  const auto tensors = parameters.vec();
  EncodeCall call{input,
                  key_mask,
                  {},
                  {head_dim, scale, eps, eps, parse_activation(activation)},
                  norm_first,
                  causal,
                  parse_padding(padding)};
  for (int64_t i = 0; i < num_layers; ++i) {
    const auto per_layer = count / num_layers;
    call.layers.push_back(
        engine::layer_parameters(c10::ArrayRef<OptionalTensor>(tensors).slice(i * per_layer, per_layer)));
    check_layer(input, call.layers.back(), i, head_dim);
  }
  return call;
}

Tensor encode(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
              int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
              bool norm_first, bool causal, c10::string_view padding, std::optional<at::ScalarType> product_dtype) {
  static const auto op = operator_handle("resnorm::encode", &encode);
  return op.call(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation, norm_first, causal, padding,
                 product_dtype);
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "encode(Tensor input, Tensor? key_mask, Tensor?[] parameters, int num_layers, *, int head_dim, float scale, "
      "float eps, str activation, bool norm_first=False, bool causal=False, str padding=\"skip\", "
      "ScalarType? product_dtype=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) { m.impl("encode", encode_meta); }

}  // namespace resnorm
