// SPDX-License-Identifier: BSD-3-Clause
// The memory that layers have their activations in, the same from layer to layer and from call to call: fresh pages
// cost a tenth of all arithmetic.
#pragma once

#include "layer_weights.h"

namespace resnorm::engine {

// For layers of inputs of `input`'s shape, (rows, dim), and kind; products may be of another dtype, that of the
// weights, as under autocast. Up to `kept_rows` rows it is the calling thread's, which keeps it until free_workspaces()
// and has one: one Scratch at a time.
class Scratch {
 public:
  Scratch(const Layers& layers, const Tensor& input, int64_t kept_rows);
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Makes the next three as wide as `layer` has them, and their values undefined. To be called before they are used.
  void fit(const LayerWeights& layer);

  // `x`, (rows, dim), as products take it: itself, or a copy in update[0].
  Tensor operand(const Tensor& x) const;

  Tensor qkv, context;
  Tensor hidden;     // of the feed-forward, in the memory of the other two
  Tensor state[2];   // (rows, dim)
  Tensor update[2];  // the same memory; where products have another dtype, one matrix of that for both

 private:
  Tensor matrix(int64_t offset, int64_t cols, at::ScalarType dtype) const;
  int64_t bytes_of(int64_t cols, at::ScalarType dtype) const;  // whole lines

  int64_t rows_;
  at::ScalarType product_dtype_;
  Tensor owned_;
  char* memory_;
  int64_t kept_bytes_;  // of states and updates
};

}  // namespace resnorm::engine
