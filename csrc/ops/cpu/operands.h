// SPDX-License-Identifier: BSD-3-Clause
// From tensors to the kernels' operands: pointers, row strides and dtypes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../../kernels/cpu/kernels.h"

namespace resnorm {

// A tensor as rows of contiguous elements: itself where its strides allow, else a contiguous copy, which is held alive.
class RowView {
 public:
  // The trailing `row_dims` dimensions make up a row.
  RowView(const at::Tensor& tensor, int64_t row_dims);

  cpu::ConstRows const_rows() const;

 private:
  at::Tensor tensor_;
  int64_t row_stride_;
};

// A tensor that a kernel fills: the tensor itself where its strides allow, else a contiguous stand-in that `commit`
// copies over.
class OutputRows {
 public:
  OutputRows(at::Tensor output, int64_t row_dims);

  cpu::Rows rows() const;
  void commit();

 private:
  at::Tensor output_, target_;
  int64_t row_stride_;
};

// A contiguous vector operand; an absent tensor gives an absent operand.
class VectorView {
 public:
  explicit VectorView(const std::optional<at::Tensor>& tensor);

  cpu::ConstVector const_vector() const;

 private:
  at::Tensor tensor_;
};

// A freshly allocated result; one that was not asked for (unused_result) is an absent operand.
cpu::Rows result_rows(const at::Tensor& result, int64_t cols, bool wanted);
cpu::Vector result_vector(const at::Tensor& result, bool wanted);

cpu::DType kernel_dtype(at::ScalarType dtype);

struct RowCounts {
  int64_t rows, cols;
};
RowCounts row_counts(const at::Tensor& tensor, int64_t row_dims);

cpu::Dropout kernel_dropout(double p, const std::optional<at::Tensor>& seed);

// Scratch memory for a backward pass that sums `column_sums` columns' gradients.
at::Tensor backward_workspace(RowCounts counts, int column_sums, at::ScalarType accumulation);

// The kernels in use; an unknown RESNORM_CPU_ISA is a ValueError.
const cpu::KernelTable& cpu_kernels();

// PyTorch's own thread pool, as the kernels call it.
void parallel_for(int64_t count, int64_t grain, cpu::RangeBody body, const void* context);

}  // namespace resnorm
