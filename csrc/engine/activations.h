// SPDX-License-Identifier: BSD-3-Clause
// The memory that layers have their activations in, the same from layer to layer and from call to call: fresh pages
// cost a tenth of all arithmetic.
#pragma once

#include "layer_weights.h"

namespace resnorm::engine {

// For layers of inputs of `input`'s shape, (rows, dim), and kind. Up to `kept_rows` rows it is the calling thread's,
// which keeps it until free_workspaces() and has one: one Activations at a time.
class Activations {
 public:
  Activations(const Layers& layers, const Tensor& input, int64_t kept_rows);
  Activations(const Activations&) = delete;
  Activations& operator=(const Activations&) = delete;

  // Makes the next three as wide as `layer` has them, and their values undefined. To be called before they are used.
  void fit(const LayerWeights& layer);

  Tensor qkv, context;
  Tensor hidden;     // of the feed-forward, in the memory of the other two
  Tensor stream[2];  // (rows, dim)

 private:
  Tensor matrix(int64_t offset, int64_t cols) const;
  int64_t bytes_of(int64_t cols) const;  // whole lines

  int64_t rows_;
  at::TensorOptions options_;
  Tensor owned_;
  char* memory_;
  int64_t stream_bytes_;
};

}  // namespace resnorm::engine
