// SPDX-License-Identifier: BSD-3-Clause
// From tensors to the kernels' operands, on every device: pointers, row strides and dtypes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../../kernels/arguments.h"

namespace resnorm {

// A tensor as rows of contiguous elements: itself where its strides allow, else a contiguous copy, which is held alive.
class RowView {
 public:
  // The trailing `row_dims` dimensions make up a row.
  RowView(const at::Tensor& tensor, int64_t row_dims);

  ConstRows const_rows() const;

 private:
  at::Tensor tensor_;
  int64_t row_stride_;
};

// A tensor that a kernel fills: the tensor itself where its strides allow, else a contiguous stand-in that `commit`
// copies over.
class OutputRows {
 public:
  OutputRows(at::Tensor output, int64_t row_dims);

  Rows rows() const;
  void commit();

 private:
  at::Tensor output_, target_;
  int64_t row_stride_;
};

// A contiguous vector operand; an absent tensor gives an absent operand.
class VectorView {
 public:
  explicit VectorView(const std::optional<at::Tensor>& tensor);

  ConstVector const_vector() const;

 private:
  at::Tensor tensor_;
};

// A freshly allocated result; one that was not asked for is an absent operand.
Rows result_rows(const at::Tensor& result, int64_t row_dims, bool wanted);
Vector result_vector(const at::Tensor& result, bool wanted);

DType kernel_dtype(at::ScalarType dtype);

struct RowCounts {
  int64_t rows, cols;
};
RowCounts row_counts(const at::Tensor& tensor, int64_t row_dims);

// Where nothing is normalized, the last dimension makes up a row; a zero-dimensional tensor is one row of one element.
inline int64_t row_dims_of(const at::Tensor& tensor) { return tensor.dim() == 0 ? 0 : 1; }

}  // namespace resnorm
