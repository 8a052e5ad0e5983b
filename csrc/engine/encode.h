// SPDX-License-Identifier: BSD-3-Clause
// Inference on the CPU through Transformer layers, in one call: between products there is little to do but to start the
// next one. No grad; inputs are not written, and results lie in memory of their own.
#pragma once

#include <functional>

#include "layer_weights.h"

namespace resnorm::engine {

// How many rows go through the layers at once: what is written for them stays in the caches. Memory for as many is kept
// by every thread that runs layers.
constexpr int64_t kMaxRows = 1024;

// The output of layers for packed `tokens`, (tokens, dim), whose sequences' bounds are `cu_seqlens`: of post-norm
// layers (Vaswani et al. 2017; BERT) or, with `norm_first`, pre-norm ones (Xiong et al. 2020; ViT). Batches of more
// than `max_rows` tokens go through the layers in chunks (chunks.h).
Tensor encode(const Tensor& tokens, const Tensor& cu_seqlens, const Layers& layers, bool norm_first, bool causal,
              int64_t max_rows);

// The output of a pre-norm layer whose attention is somebody else's: `attend` makes a context, (rows, ...), of queries,
// keys and values, (rows, 3, heads, head_dim), which it may keep.
Tensor pre_norm_layer(const Tensor& x, const std::shared_ptr<const LayerWeights>& layer,
                      const std::function<Tensor(const Tensor&)>& attend, int64_t max_rows);

}  // namespace resnorm::engine
