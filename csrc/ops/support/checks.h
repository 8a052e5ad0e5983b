// SPDX-License-Identifier: BSD-3-Clause
// Argument checks that the operators share. Each failure says what was expected and what came, with the exception type
// that torch raises for the same mistake.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <initializer_list>
#include <optional>

namespace resnorm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// float32 and float64, bfloat16 and float16.
void check_floating(const char* op, const Tensor& input);

// Where nothing is normalized, the last dimension makes up a row; a zero-dimensional tensor is one row of one element.
c10::SymIntArrayRef row_shape(const Tensor& tensor);

// A weight or bias of the normalized shape: the input's dtype, or float32 beside a half-precision input.
void check_parameter(const char* name, const OptionalTensor& parameter, c10::SymIntArrayRef shape, const Tensor& input);

void check_normalized_shape(const Tensor& input, c10::SymIntArrayRef normalized_shape);

// input and residual have one shape and device; with dropout there is an int64 scalar seed on that device.
void check_residual(const char* op, const Tensor& input, const Tensor& residual,
                    std::optional<at::ScalarType> residual_dtype);
void check_dropout(double dropout_p, const OptionalTensor& seed, const Tensor& input);

// An `out` tensor must have the result's shape, dtype and device.
void check_out(const char* name, const Tensor& out, c10::SymIntArrayRef shape, at::ScalarType dtype, at::Device device);

// The dtype of residual + input: `residual_dtype` where given, else the promoted one.
at::ScalarType sum_dtype(const Tensor& input, const Tensor& residual, std::optional<at::ScalarType> residual_dtype);

// Statistics and accumulation: float64 where one of the operands named is float64, else float32.
inline at::ScalarType accumulation_dtype(std::initializer_list<at::ScalarType> operands) {
  for (const auto dtype : operands) {
    if (dtype == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

void check_shape(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape);

// A gradient can be wanted only of a parameter that is there, and that has the shape it must have.
void check_wanted(const char* name, bool wanted, const OptionalTensor& parameter, c10::SymIntArrayRef shape);

// One statistic a row.
inline c10::SymIntArrayRef statistics_shape(const Tensor& input, c10::SymIntArrayRef normalized_shape) {
  return input.sym_sizes().slice(0, input.dim() - normalized_shape.size());
}

// Where a gradient goes, undefined where it is not wanted: like a parameter, or like `tensor` but for the dtype.
Tensor empty_gradient_like(const OptionalTensor& parameter, bool wanted);
Tensor empty_gradient_like(const Tensor& tensor, at::ScalarType dtype, bool wanted);

}  // namespace resnorm
