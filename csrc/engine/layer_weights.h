// SPDX-License-Identifier: BSD-3-Clause
// What inference needs of a Transformer layer (Vaswani et al. 2017), however a library has built it.
#pragma once

#include <memory>
#include <vector>

#include "linear/backend.h"

namespace resnorm::engine {

// A linear layer without grad.
struct PreparedLinear {
  // From a weight, (out_features, in_features), and a bias of its dtype; RuntimeError for any other.
  PreparedLinear(const Tensor& weight, const OptionalTensor& bias, const LinearBackend& backend);

  // activation(input weight^T + bias), (*, out_features).
  Tensor operator()(const Tensor& input, Activation activation = Activation::kNone) const;

  // The same of a matrix; a backend that writes where it is told writes to `memory`, (rows, out_features).
  Tensor multiply(const Tensor& input, const Tensor& memory, Activation activation = Activation::kNone) const;

  Tensor weight;  // as its backend reads it
  OptionalTensor bias;
  const LinearBackend* backend;
  int64_t in_features, out_features;

 private:
  void check_input(const Tensor& input) const;
};

// A layer norm over the last dimension.
struct Norm {
  OptionalTensor weight, bias;
  double eps;
};

// A layer of self-attention and feed-forward.
struct LayerWeights {
  int64_t num_heads;
  double scale;        // of the attention scores
  PreparedLinear qkv;  // queries, keys and values, each num_heads * head_dim wide, side by side
  PreparedLinear attention_output;
  Norm attention_norm;  // follows the block's residual add in a post-norm layer, comes before the block in a pre-norm
                        // one
  PreparedLinear intermediate;
  Activation activation;  // the feed-forward's
  PreparedLinear output;
  Norm feed_forward_norm;  // as attention_norm
};

using Layers = std::vector<std::shared_ptr<const LayerWeights>>;

}  // namespace resnorm::engine
