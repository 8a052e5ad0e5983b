// SPDX-License-Identifier: BSD-3-Clause
#include "operands.h"

#include <ATen/ops/empty.h>

namespace resnorm {

namespace {

// The one distance between consecutive rows, where the rows are contiguous inside and evenly spaced.
std::optional<int64_t> uniform_row_stride(const at::Tensor& tensor, int64_t row_dims) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t leading = tensor.dim() - row_dims;
  int64_t cols = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= leading; --dim) {
    if (sizes[dim] != 1 && strides[dim] != cols) return std::nullopt;
    cols *= sizes[dim];
  }
  std::optional<int64_t> row_stride;
  int64_t expected = 0;
  for (int64_t dim = leading - 1; dim >= 0; --dim) {
    if (sizes[dim] == 1) continue;
    if (row_stride.has_value() && strides[dim] != expected) return std::nullopt;
    if (!row_stride.has_value()) row_stride = strides[dim];
    expected = strides[dim] * sizes[dim];
  }
  return row_stride.value_or(cols);
}

}  // namespace

RowView::RowView(const at::Tensor& tensor, int64_t row_dims) {
  const auto row_stride = uniform_row_stride(tensor, row_dims);
  tensor_ = row_stride.has_value() ? tensor : tensor.contiguous();
  row_stride_ = row_stride.has_value() ? *row_stride : row_counts(tensor, row_dims).cols;
}

ConstRows RowView::const_rows() const {
  return {tensor_.const_data_ptr(), row_stride_, kernel_dtype(tensor_.scalar_type())};
}

OutputRows::OutputRows(at::Tensor output, int64_t row_dims) : output_(std::move(output)) {
  const auto row_stride = uniform_row_stride(output_, row_dims);
  target_ = row_stride.has_value() ? output_ : at::empty(output_.sizes(), output_.options());
  row_stride_ = row_stride.has_value() ? *row_stride : row_counts(output_, row_dims).cols;
}

Rows OutputRows::rows() const { return {target_.mutable_data_ptr(), row_stride_, kernel_dtype(target_.scalar_type())}; }

void OutputRows::commit() {
  if (!target_.is_same(output_)) output_.copy_(target_);
}

VectorView::VectorView(const std::optional<at::Tensor>& tensor) {
  if (tensor.has_value()) tensor_ = tensor->contiguous();
}

ConstVector VectorView::const_vector() const {
  if (!tensor_.defined()) return {};
  return {tensor_.const_data_ptr(), kernel_dtype(tensor_.scalar_type())};
}

Rows result_rows(const at::Tensor& result, int64_t row_dims, bool wanted) {
  if (!wanted) return {};
  return {result.mutable_data_ptr(), row_counts(result, row_dims).cols, kernel_dtype(result.scalar_type())};
}

Vector result_vector(const at::Tensor& result, bool wanted) {
  if (!wanted) return {};
  return {result.mutable_data_ptr(), kernel_dtype(result.scalar_type())};
}

DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}

RowCounts row_counts(const at::Tensor& tensor, int64_t row_dims) {
  const auto sizes = tensor.sizes();
  const auto leading = sizes.size() - row_dims;
  return {c10::multiply_integers(sizes.slice(0, leading)), c10::multiply_integers(sizes.slice(leading))};
}

}  // namespace resnorm
