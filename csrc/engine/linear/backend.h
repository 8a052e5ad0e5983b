// SPDX-License-Identifier: BSD-3-Clause
// Who multiplies in inference. A backend is one of these, in a file of its own, and a row in choice.cpp.
#pragma once

#include "../../ops/activation.h"
#include "../../ops/support/checks.h"

namespace resnorm::engine {

struct LinearBackend {
  const char* name;

  // Whether this PyTorch and this CPU can multiply in `dtype`.
  bool (*supports)(at::ScalarType dtype);

  // `weight`, (out_features, in_features), as multiply() reads it.
  Tensor (*prepack)(const Tensor& weight);

  // activation(input weight^T + bias), (rows, out_features), of a matrix and a prepacked weight, without grad. A
  // backend that can write where it is told writes to `memory`, of that shape and contiguous, if it is defined.
  Tensor (*multiply)(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                     int64_t out_features, const Tensor& memory);

  // The least number of rows, `rows` or more, that are multiplied without a copy.
  int64_t (*padded_rows)(int64_t rows);
};

// What `backend` multiplies of an input, (*, in_features).
Tensor multiply(const LinearBackend& backend, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                Activation activation, int64_t out_features);

}  // namespace resnorm::engine
