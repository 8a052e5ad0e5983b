// SPDX-License-Identifier: BSD-3-Clause
// The one forward kernel behind layer_norm and add_layer_norm, on tensors.
#pragma once

#include "../checks.h"
#include "../operands.h"

namespace resnorm {

// What the caller has checked. An absent residual makes it layer_norm.
struct NormForwardInputs {
  const Tensor& input;
  OptionalTensor residual = std::nullopt;
  const OptionalTensor &weight, &bias;
  double eps;
  OptionalTensor input_bias = std::nullopt;
  double dropout_p = 0.0;
  OptionalTensor seed = std::nullopt;
};

// A sum that is not stored has its dtype alone.
struct NormForwardResults {
  Rows output = {}, sum = {};
  void* mean = nullptr;
  void* rstd = nullptr;
};

void norm_forward_cuda(const char* op, int64_t row_dims, const NormForwardInputs& inputs,
                       const NormForwardResults& results);

}  // namespace resnorm
