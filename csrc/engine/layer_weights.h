// SPDX-License-Identifier: BSD-3-Clause
// What inference needs of a Transformer layer (Vaswani et al. 2017), however a library has built it.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../ops/cpu/linear_backend.h"

namespace resnorm::engine {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A linear layer without grad. The weight may be prepacked, and then only its backend can read it.
struct PreparedLinear {
  Tensor weight;
  OptionalTensor bias;
  LinearBackend backend;
  int64_t out_features;

  // activation(input weight^T + bias), (*, out_features); `activation` by its name.
  Tensor operator()(const Tensor& input, c10::string_view activation) const;

  // The same of a matrix; the backend that writes where it is told writes to `memory`, (rows, out_features).
  Tensor multiply(const Tensor& input, const Tensor& memory, c10::string_view activation = "none") const;
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
  std::string activation;  // the feed-forward's
  PreparedLinear output;
  Norm feed_forward_norm;  // as attention_norm
};

using Layers = std::vector<std::shared_ptr<const LayerWeights>>;

}  // namespace resnorm::engine
