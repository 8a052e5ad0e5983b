// SPDX-License-Identifier: BSD-3-Clause
// The one backward kernel behind layer_norm and add_layer_norm, on tensors.
#pragma once

#include "../checks.h"
#include "../operands.h"

namespace resnorm {

// What the caller has checked: grad_output and the norm's input, `sum`. Without `adds` it is layer_norm's.
struct NormBackwardInputs {
  bool adds;
  const Tensor &grad_output, &sum;
  OptionalTensor grad_sum;
  const OptionalTensor& weight;
  const Tensor &mean, &rstd;
  double dropout_p = 0.0;
  OptionalTensor seed = std::nullopt;
};

struct NormBackwardResults {
  Rows grad_input = {}, grad_residual = {};
  Vector grad_weight = {}, grad_bias = {}, grad_input_bias = {};
};

// For rows of at least one element; without rows the parameters' gradients are zeros.
void norm_backward_cuda(const char* op, int64_t row_dims, const NormBackwardInputs& inputs,
                        const NormBackwardResults& results);

}  // namespace resnorm
