// SPDX-License-Identifier: BSD-3-Clause
// From the parameters of a library's layer to what inference reads.
#pragma once

#include <vector>

#include "layer_weights.h"

namespace resnorm::engine {

// One linear layer, or several of one input whose outputs are to lie side by side.
struct LinearParameters {
  std::vector<Tensor> weights;  // (out_features, in_features) each
  std::vector<OptionalTensor> biases;
};

struct NormParameters {
  OptionalTensor weight, bias;
};

// A layer's, in the order in which a post-norm one computes.
struct LayerParameters {
  LinearParameters projections;  // of queries, keys and values, or one of all three
  LinearParameters attention_output;
  NormParameters attention_norm;
  LinearParameters intermediate, output;
  NormParameters feed_forward_norm;
};

// What a layer is beside its parameters.
struct LayerOptions {
  int64_t head_dim;
  double scale;  // of the attention scores
  double attention_eps, feed_forward_eps;
  Activation activation;
  bool transposed = false;  // whether weights are (in_features, out_features)
};

// What is computed in which dtype.
struct Precision {
  at::ScalarType products;
  at::ScalarType stream;  // of all else: residual sums and norms
};

// The number of parameters of a layer with one projection, and with three.
constexpr int64_t kJoinedParameters = 12, kSeparateParameters = 16;

// A layer's from as many tensors: weight and bias of each projection, then of the rest.
LayerParameters layer_parameters(c10::ArrayRef<OptionalTensor> tensors);

// RuntimeError where the parameters do not fit each other.
PreparedLinear prepare_linear(const LinearParameters& parameters, bool transposed, at::ScalarType dtype);
std::shared_ptr<LayerWeights> prepare_layer(const LayerParameters& parameters, const LayerOptions& options,
                                            Precision precision);

}  // namespace resnorm::engine
