// SPDX-License-Identifier: BSD-3-Clause
#include "checks.h"

#include <ATen/ops/empty.h>

#include "dropout.h"

namespace resnorm {

namespace {

void check_device(const char* name, const Tensor& tensor, at::Device expected) {
  TORCH_CHECK(tensor.device() == expected, "Expected ", name, " on ", expected, ", the input's device, but got ", name,
              " on ", tensor.device());
}

// FakeTensor takes a meta kernel's NotImplementedError for the lack of one.
void check_dtype(const char* op, at::ScalarType dtype, bool is_meta) {
  if (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf) return;
  const auto message = c10::str(op, ": expected float32, float64, bfloat16 or float16, but got ", dtype);
  TORCH_CHECK(!is_meta, message);
  TORCH_CHECK_NOT_IMPLEMENTED(false, message);
}

}  // namespace

void check_floating(const char* op, const Tensor& input) {
  TORCH_CHECK(input.layout() == at::kStrided && !input.is_nested(), op, ": expected a strided tensor, but got ",
              input.is_nested() ? "a nested one" : c10::str("one of layout ", input.layout()));
  check_dtype(op, input.scalar_type(), input.is_meta());
}

c10::SymIntArrayRef row_shape(const Tensor& tensor) {
  const auto sizes = tensor.sym_sizes();
  return sizes.slice(sizes.empty() ? 0 : sizes.size() - 1);
}

void check_shape(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape) {
  TORCH_CHECK(tensor.sym_sizes() == shape, "Expected ", name, " to be of shape ", shape, ", but got ", name,
              " of shape ", tensor.sym_sizes());
}

void check_parameter(const char* name, const OptionalTensor& parameter, c10::SymIntArrayRef shape,
                     const Tensor& input) {
  if (!parameter.has_value()) return;
  check_shape(name, *parameter, shape);
  check_device(name, *parameter, input.device());
  const auto input_dtype = input.scalar_type(), dtype = parameter->scalar_type();
  const bool half = input_dtype == at::kBFloat16 || input_dtype == at::kHalf;
  TORCH_CHECK(dtype == input_dtype || (half && dtype == at::kFloat), "Expected ", name, " of dtype ", input_dtype,
              half ? " or Float" : "", " for an input of ", input_dtype, ", but got ", name, " of ", dtype);
}

void check_normalized_shape(const Tensor& input, c10::SymIntArrayRef normalized_shape) {
  const auto ndim = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(ndim >= 1,
              "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, ",
              "but got normalized_shape = ", normalized_shape);
  const auto sizes = input.sym_sizes();
  TORCH_CHECK(input.dim() >= ndim && sizes.slice(sizes.size() - ndim) == normalized_shape,
              "Given normalized_shape=", normalized_shape, ", expected input with shape [*, ", normalized_shape,
              "], but got input of size ", sizes);
}

void check_residual(const char* op, const Tensor& input, const Tensor& residual,
                    std::optional<at::ScalarType> residual_dtype) {
  check_floating(op, residual);
  if (residual_dtype.has_value()) check_dtype(op, *residual_dtype, input.is_meta());
  TORCH_CHECK(input.sym_sizes() == residual.sym_sizes(), "Expected residual of the input's shape ", input.sym_sizes(),
              ", but got residual of shape ", residual.sym_sizes());
  check_device("residual", residual, input.device());
}

void check_dropout(double dropout_p, const OptionalTensor& seed, const Tensor& input) {
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, "dropout probability has to be between 0 and 1, but got ",
                    dropout_p);
  if (dropout_threshold(dropout_p) == 0) return;
  TORCH_CHECK(seed.has_value(), "Expected a seed for dropout_p = ", dropout_p, ", but got None");
  TORCH_CHECK(seed->scalar_type() == at::kLong && seed->dim() == 0,
              "Expected seed to be an int64 scalar tensor, but got ", seed->scalar_type(), " of shape ",
              seed->sym_sizes());
  check_device("seed", *seed, input.device());
}

void check_out(const char* name, const Tensor& out, c10::SymIntArrayRef shape, at::ScalarType dtype,
               at::Device device) {
  check_shape(name, out, shape);
  TORCH_CHECK(out.scalar_type() == dtype, "Expected ", name, " of dtype ", dtype, ", but got ", name, " of ",
              out.scalar_type());
  check_device(name, out, device);
}

at::ScalarType sum_dtype(const Tensor& input, const Tensor& residual, std::optional<at::ScalarType> residual_dtype) {
  // By dtypes alone: at::result_type would let a zero-dimensional tensor's dtype give way.
  return residual_dtype.value_or(c10::promoteTypes(input.scalar_type(), residual.scalar_type()));
}

void check_wanted(const char* name, bool wanted, const OptionalTensor& parameter, c10::SymIntArrayRef shape) {
  if (!wanted) return;
  TORCH_CHECK(parameter.has_value(), "Expected ", name, " where its gradient is wanted, but got None");
  check_shape(name, *parameter, shape);
}

Tensor empty_gradient_like(const OptionalTensor& parameter, bool wanted) {
  return wanted ? at::empty_symint(parameter->sym_sizes(), parameter->options()) : Tensor();
}

Tensor empty_gradient_like(const Tensor& tensor, at::ScalarType dtype, bool wanted) {
  return wanted ? at::empty_symint(tensor.sym_sizes(), tensor.options().dtype(dtype)) : Tensor();
}

}  // namespace resnorm
