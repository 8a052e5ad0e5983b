// SPDX-License-Identifier: BSD-3-Clause
// Where the rows of a call's matrices start: whether vectors can be laid through all of them alike.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "plan.h"

namespace resnorm::cuda {

class Alignment {
 public:
  Alignment(std::int64_t rows, int vector) : rows_(rows), vector_(vector) {}

  template <class Matrix>
  Alignment& with(const Matrix& matrix) {
    if (matrix.data == nullptr) return *this;
    const auto address = reinterpret_cast<std::uintptr_t>(matrix.data);
    const auto first = static_cast<int>(address / size_of(matrix.dtype) % vector_);
    const std::int64_t stride = rows_ > 1 ? matrix.row_stride % vector_ : 0;
    alike_ = alike_ && address % size_of(matrix.dtype) == 0 && (is_empty_ || (first == first_ && stride == stride_));
    first_ = first;
    stride_ = stride;
    is_empty_ = false;
    return *this;
  }

  // Row r of every matrix starts at the same element of a vector: (first_element() + r * row_stride) modulo the vector.
  bool alike() const { return alike_; }
  int first_element() const { return first_; }
  // Rows start elsewhere than at a vector, or end there.
  bool shifted(std::int64_t cols) const { return first_ != 0 || stride_ != 0 || cols % vector_ != 0; }

 private:
  std::int64_t rows_;
  int vector_, first_ = 0;
  std::int64_t stride_ = 0;
  bool alike_ = true, is_empty_ = true;
};

// The parameters of a call: of the branch's type, or all of them float32 beside a half-precision branch.
class ParameterTypes {
 public:
  explicit ParameterTypes(DType branch) : branch_(branch) {}

  ParameterTypes& with(const ConstVector& parameter) {
    if (parameter.data == nullptr) return *this;
    const bool wide = parameter.dtype != branch_;
    alike_ = alike_ && (is_empty_ || wide == float32_) && (!wide || parameter.dtype == DType::kFloat32);
    aligned_ = aligned_ && reinterpret_cast<std::uintptr_t>(parameter.data) % kVectorBytes == 0;
    float32_ = wide;
    is_empty_ = false;
    return *this;
  }

  bool alike() const { return alike_; }
  bool float32() const { return float32_; }
  bool aligned() const { return aligned_; }  // all start at multiples of a vector

 private:
  DType branch_;
  bool alike_ = true, aligned_ = true, float32_ = false, is_empty_ = true;
};

}  // namespace resnorm::cuda
