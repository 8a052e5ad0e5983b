// SPDX-License-Identifier: BSD-3-Clause
// Operands for the kernels: matrices and vectors of any element type, row distance and alignment, with guards around
// them that show a write out of bounds.
#pragma once

#include <gtest/gtest.h>

#include <new>
#include <random>
#include <vector>

#include "numbers.h"

namespace resnorm::cpu::testing {

// Memory that starts at a multiple of 64 bytes, so that where rows start is up to the layout alone.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  AlignedAllocator() = default;
  template <class Other>
  explicit AlignedAllocator(const AlignedAllocator<Other>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAlignment)); }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, kAlignment); }
  bool operator==(const AlignedAllocator&) const { return true; }
};
using Bytes = std::vector<unsigned char, AlignedAllocator<unsigned char>>;

// How a matrix lies in memory.
struct Layout {
  std::int64_t padding = 0;  // elements between rows
  std::int64_t offset = 0;   // elements before the first row: breaks alignment
};

class Matrix {
 public:
  Matrix() = default;
  Matrix(std::int64_t rows, std::int64_t cols, DType dtype, Layout layout = {})
      : rows_(rows),
        cols_(cols),
        dtype_(dtype),
        row_stride_(cols + layout.padding),
        offset_(layout.offset),
        storage_(static_cast<std::size_t>((kGuard + layout.offset + rows * row_stride_ + kGuard) * size_of(dtype)),
                 kGuardByte) {}

  static Matrix random(std::mt19937_64& generator, std::int64_t rows, std::int64_t cols, DType dtype,
                       Layout layout = {}, double mean = 0.0, double deviation = 1.0) {
    Matrix matrix(rows, cols, dtype, layout);
    std::normal_distribution<double> normal(mean, deviation);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) matrix.set(row, col, normal(generator));
    }
    return matrix;
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }
  bool present() const { return !storage_.empty(); }
  const Bytes& storage() const { return storage_; }

  double operator()(std::int64_t row, std::int64_t col) const { return read(data(), row * row_stride_ + col, dtype_); }
  void set(std::int64_t row, std::int64_t col, double value) { write(data(), row * row_stride_ + col, dtype_, value); }

  // An absent matrix is an absent operand.
  ConstRows const_operand() const { return present() ? ConstRows{data(), row_stride_, dtype_} : ConstRows{}; }
  Rows operand() { return present() ? Rows{data(), row_stride_, dtype_} : Rows{}; }
  ConstVector const_vector() const { return present() ? ConstVector{data(), dtype_} : ConstVector{}; }
  Vector vector() { return present() ? Vector{data(), dtype_} : Vector{}; }

  // Nothing between and around the rows was written.
  void expect_guards_untouched() const {
    if (!present()) return;
    Bytes outside = storage_;
    const auto size = size_of(dtype_);
    for (std::int64_t row = 0; row < rows_; ++row) {
      const auto begin = outside.begin() + (kGuard + offset_ + row * row_stride_) * size;
      std::fill(begin, begin + cols_ * size, kGuardByte);
    }
    EXPECT_EQ(outside, Bytes(storage_.size(), kGuardByte)) << "written outside of the rows";
  }

 private:
  static constexpr std::int64_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xA5;

  void* data() { return storage_.data() + (kGuard + offset_) * size_of(dtype_); }
  const void* data() const { return storage_.data() + (kGuard + offset_) * size_of(dtype_); }

  std::int64_t rows_ = 0, cols_ = 0;
  DType dtype_ = DType::kFloat32;
  std::int64_t row_stride_ = 0, offset_ = 0;
  Bytes storage_;
};

// Values of the reference: float64, contiguous.
class Values {
 public:
  Values(std::int64_t rows, std::int64_t cols) : cols_(cols), values_(static_cast<std::size_t>(rows * cols)) {}

  double& operator()(std::int64_t row, std::int64_t col) {
    return values_[static_cast<std::size_t>(row * cols_ + col)];
  }
  double operator()(std::int64_t row, std::int64_t col) const {
    return values_[static_cast<std::size_t>(row * cols_ + col)];
  }

 private:
  std::int64_t cols_;
  std::vector<double> values_;
};

// Every element is the expected one within rounding to its type plus `scale` times some roundings of the accumulation.
// NaN is expected where the reference is NaN.
inline void expect_close(const Matrix& actual, const Values& expected, const Values& scale, DType accumulation,
                         double roundings, const char* what) {
  if (!actual.present()) return;
  actual.expect_guards_untouched();
  for (std::int64_t row = 0; row < actual.rows(); ++row) {
    for (std::int64_t col = 0; col < actual.cols(); ++col) {
      const double want = expected(row, col), got = actual(row, col);
      if (std::isnan(want) || std::isinf(want)) {
        ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
            << what << " (" << row << ", " << col << "): expected " << want << ", got " << got;
        continue;
      }
      const double tolerance = 1.01 * unit_roundoff(actual.dtype()) * std::fabs(want) + smallest(actual.dtype()) +
                               roundings * unit_roundoff(accumulation) * scale(row, col);
      ASSERT_LE(std::fabs(got - want), tolerance)
          << what << " (" << row << ", " << col << "): expected " << want << ", got " << got;
    }
  }
}

}  // namespace resnorm::cpu::testing
