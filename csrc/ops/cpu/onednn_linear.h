// SPDX-License-Identifier: BSD-3-Clause
// Linear layers by oneDNN, through operators that PyTorch keeps for its own compiler. They lose gradients, so nothing
// here may run where autograd records.
#pragma once

#include "../linear.h"

namespace resnorm::onednn {

// Whether this PyTorch has those operators and this CPU can run them in `dtype`: float32, or bfloat16 where the CPU
// has instructions for it.
bool supports(at::ScalarType dtype);

// `weight` in the layout that oneDNN's kernels read fastest: an opaque tensor of the same size, good for linear() only.
Tensor prepack_weight(const Tensor& weight);

// As resnorm::linear; `weight` is plain or prepacked.
Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
              const OptionalTensor& residual);

// The least number of rows >= `rows` that linear() computes in one piece.
int64_t padded_rows(int64_t rows);

}  // namespace resnorm::onednn
