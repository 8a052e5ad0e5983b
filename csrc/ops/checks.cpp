// SPDX-License-Identifier: BSD-3-Clause
#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "dropout.h"

namespace resnorm {

namespace {

void check_device(const char* name, const Tensor& tensor, at::Device expected) {
  TORCH_CHECK(tensor.device() == expected, "Expected ", name, " on ", expected, ", the input's device, but got ", name,
              " on ", tensor.device());
}

void check_dtype(const char* op, at::ScalarType dtype) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
      ": expected float32, float64, bfloat16 or float16, but got ", dtype);
}

// Whether the strides span `distance` (in elements) between two indices of a tensor of these sizes.
bool spans(c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t distance) {
  if (sizes.empty()) return distance == 0;
  const auto inner_sizes = sizes.slice(1), inner_strides = strides.slice(1);
  if (sizes[0] == 1) return spans(inner_sizes, inner_strides, distance);
  int64_t reach = 0;  // of the inner dimensions
  for (size_t dim = 0; dim < inner_sizes.size(); ++dim) reach += (inner_sizes[dim] - 1) * inner_strides[dim];
  const auto first = std::max((distance - reach) / strides[0] - 1, 1 - sizes[0]);
  const auto last = std::min((distance + reach) / strides[0] + 1, sizes[0] - 1);
  for (auto steps = first; steps <= last; ++steps) {
    if (spans(inner_sizes, inner_strides, distance - steps * strides[0])) return true;
  }
  return false;
}

// Whether two views of one memory with the same strides, as slices of a wider buffer are, share elements without being
// the same. at::assert_no_partial_overlap sees that only in tensors without gaps.
bool are_shifted(const Tensor& a, const Tensor& b) {
  const auto distance = b.storage_offset() - a.storage_offset();
  return distance != 0 && a.is_alias_of(b) && a.itemsize() == b.itemsize() && a.sizes() == b.sizes() &&
         a.strides() == b.strides() && spans(a.sizes(), a.strides(), distance);
}

}  // namespace

void check_floating(const char* op, const Tensor& input) { check_dtype(op, input.scalar_type()); }

void check_parameter(const char* name, const OptionalTensor& parameter, c10::SymIntArrayRef shape,
                     const Tensor& input) {
  if (!parameter.has_value()) return;
  TORCH_CHECK(parameter->sym_sizes() == shape, "Expected ", name, " to be of shape ", shape, ", but got ", name,
              " of shape ", parameter->sym_sizes());
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
  if (residual_dtype.has_value()) check_dtype(op, *residual_dtype);
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
  TORCH_CHECK(out.sym_sizes() == shape, "Expected ", name, " of shape ", shape, ", but got ", name, " of shape ",
              out.sym_sizes());
  TORCH_CHECK(out.scalar_type() == dtype, "Expected ", name, " of dtype ", dtype, ", but got ", name, " of ",
              out.scalar_type());
  check_device(name, out, device);
}

at::ScalarType sum_dtype(const Tensor& input, const Tensor& residual, std::optional<at::ScalarType> residual_dtype) {
  // By dtypes alone: at::result_type would let a zero-dimensional tensor's dtype give way.
  return residual_dtype.value_or(c10::promoteTypes(input.scalar_type(), residual.scalar_type()));
}

void check_grad(const char* name, const Tensor& grad, c10::SymIntArrayRef shape) {
  TORCH_CHECK(grad.sym_sizes() == shape, "Expected ", name, " of shape ", shape, ", but got ", name, " of shape ",
              grad.sym_sizes());
}

void check_overlap(const Tensor& written, std::initializer_list<Tensor> whole,
                   std::initializer_list<OptionalTensor> apart) {
  at::assert_no_internal_overlap(written);
  for (const auto& tensor : whole) {
    at::assert_no_partial_overlap(written, tensor);
    TORCH_CHECK(
        !are_shifted(written, tensor), "unsupported operation: some elements of an argument and the written-to ",
        "tensor refer to a single memory location, but not all do. Please clone() the tensor before performing ",
        "the operation.");
  }
  for (const auto& tensor : apart) {
    if (tensor.has_value()) at::assert_no_overlap(written, *tensor);
  }
}

std::pair<Tensor, Tensor> empty_statistics(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                           at::ScalarType accumulation) {
  const auto rows = input.sym_sizes().slice(0, input.dim() - normalized_shape.size());
  const auto options = input.options().dtype(accumulation);
  return {at::empty_symint(rows, options), at::empty_symint(rows, options)};
}

Tensor unused_result(const Tensor& like) { return at::empty({0}, like.options()); }

Tensor empty_gradient_like(const OptionalTensor& parameter, bool wanted, const Tensor& input) {
  return wanted ? at::empty_symint(parameter->sym_sizes(), parameter->options()) : unused_result(input);
}

}  // namespace resnorm
