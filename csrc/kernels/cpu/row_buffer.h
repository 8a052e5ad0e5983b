// SPDX-License-Identifier: BSD-3-Clause
// Rows in the element type that a loop is compiled for. An operand of that type is used where it lies; any other is
// converted, row by row, through a buffer, so that a few loops serve every mix of types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"
#include "workspace.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// One task's buffers: on its stack while they fit, which rows of a usual size do, else the thread's own.
class RowBuffers {
 public:
  RowBuffers() = default;
  RowBuffers(const RowBuffers&) = delete;
  RowBuffers& operator=(const RowBuffers&) = delete;

  template <class T>
  T* take(std::int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + kLineBytes - 1) / kLineBytes * kLineBytes;
    if (bytes > sizeof(stack_) - used_) return static_cast<T*>(thread_buffer(next_buffer_++, bytes));
    void* taken = stack_ + used_;
    used_ += bytes;
    return static_cast<T*>(taken);
  }

 private:
  alignas(kLineBytes) unsigned char stack_[48 * 1024];
  std::size_t used_ = 0, next_buffer_ = kFirstKernelBuffer;
};

template <class T>
RESNORM_NOINLINE void fill(T* row, std::int64_t cols, Accumulation<T> value) {
  using Acc = Accumulation<T>;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes)
                                    RESNORM_INLINE_LAMBDA { Vec<Acc>::broadcast(value).store(row + i, lanes); });
}

template <class From, class To>
RESNORM_NOINLINE void convert_row(const From* from, To* to, std::int64_t cols) {
  using Acc = Accumulation<From, To>;
  for_each_vector<Acc, 1>(cols, [&](std::int64_t i, auto, auto lanes)
                                    RESNORM_INLINE_LAMBDA { Vec<Acc>::load(from + i, lanes).store(to + i, lanes); });
}

// A weight or bias in the accumulation type; `absent` in every column where there is none.
template <class Acc>
inline const Acc* vector_or(const ConstVector& vector, Acc absent, std::int64_t cols, RowBuffers& buffers) {
  if (vector.data != nullptr && vector.dtype == kDType<Acc>) return static_cast<const Acc*>(vector.data);
  Acc* row = buffers.take<Acc>(cols);
  if (vector.data == nullptr) {
    fill(row, cols, absent);
  } else {
    visit(vector.dtype,
          [&](auto tag) { convert_row(static_cast<const typename decltype(tag)::Type*>(vector.data), row, cols); });
  }
  return row;
}

// Reads rows of a matrix as T, up to `slots` of them at a time; rows of an absent matrix are -0, which added changes no
// bit.
template <class T>
class RowReader {
 public:
  RowReader(const ConstRows& rows, std::int64_t cols, RowBuffers& buffers, int slots = 1) : rows_(rows), cols_(cols) {
    if (rows.data != nullptr && rows.dtype == kDType<T>) return;
    buffer_ = buffers.take<T>(cols * (rows.data == nullptr ? 1 : slots));
    if (rows.data == nullptr) fill(buffer_, cols, -Accumulation<T>(0));
  }

  RESNORM_INLINE const T* row(std::int64_t row, int slot = 0) const {
    if (buffer_ == nullptr) return static_cast<const T*>(rows_.data) + row * rows_.row_stride;
    return converted(row, slot);
  }

  // How far from a row that is `rows` on, which a sweep that reads from the caches prefetches. A core has a few loads
  // from memory under way at a time, and the hardware's own prefetching stops at every page. Where the first cache does
  // not hold the next rows beside those at work, it is the row itself, which is there already.
  RESNORM_INLINE std::int64_t distance_to_next(int rows) const {
    return buffer_ == nullptr && fits_ ? rows * rows_.row_stride : 0;
  }

  RESNORM_INLINE const T* next(std::int64_t row, int rows) const {
    if (buffer_ != nullptr) return buffer_;
    return static_cast<const T*>(rows_.data) + row * rows_.row_stride + distance_to_next(rows);
  }

 private:
  RESNORM_NOINLINE const T* converted(std::int64_t row, int slot) const {
    if (rows_.data == nullptr) return buffer_;
    T* to = buffer_ + slot * cols_;
    visit(rows_.dtype, [&](auto tag) {
      convert_row(static_cast<const typename decltype(tag)::Type*>(rows_.data) + row * rows_.row_stride, to, cols_);
    });
    return to;
  }

  ConstRows rows_;
  std::int64_t cols_;
  bool fits_ = cols_ <= static_cast<std::int64_t>(4096 / sizeof(T));
  T* buffer_ = nullptr;
};

// Writes rows of a matrix as T: fill row(...), then commit(...). Rows of an absent matrix go nowhere.
template <class T>
class RowWriter {
 public:
  RowWriter(const Rows& rows, std::int64_t cols, RowBuffers& buffers, int slots = 1) : rows_(rows), cols_(cols) {
    if (rows.data != nullptr && rows.dtype == kDType<T>) return;
    slot_stride_ = rows.data == nullptr ? 0 : cols;
    buffer_ = buffers.take<T>(cols * (rows.data == nullptr ? 1 : slots));
  }

  RESNORM_INLINE T* row(std::int64_t row, int slot = 0) const {
    return buffer_ == nullptr ? static_cast<T*>(rows_.data) + row * rows_.row_stride : buffer_ + slot * slot_stride_;
  }

  // Whether the rows are better written past the caches, which saves reading what is overwritten: where so many
  // matrices of `rows` rows are read and written that the caches do not hold these until somebody reads them.
  // Non-temporal stores need whole lines.
  bool may_bypass_caches(std::int64_t rows, int matrices) const {
    const auto bytes = static_cast<std::uintptr_t>(rows_.row_stride) * sizeof(T);
    return buffer_ == nullptr && (reinterpret_cast<std::uintptr_t>(rows_.data) | bytes) % kLineBytes == 0 &&
           rows >= non_temporal_bytes() / static_cast<std::int64_t>(sizeof(T)) / matrices / cols_;
  }

  RESNORM_INLINE void commit(std::int64_t row, int slot = 0) const {
    if (buffer_ != nullptr && rows_.data != nullptr) convert_back(row, slot);
  }

 private:
  RESNORM_NOINLINE void convert_back(std::int64_t row, int slot) const {
    visit(rows_.dtype, [&](auto tag) {
      convert_row(buffer_ + slot * slot_stride_,
                  static_cast<typename decltype(tag)::Type*>(rows_.data) + row * rows_.row_stride, cols_);
    });
  }

  Rows rows_;
  std::int64_t cols_, slot_stride_ = 0;
  T* buffer_ = nullptr;
};

// Whether every operand that is there has element type T.
template <class T, class... Operands>
inline bool all_are(const Operands&... operands) {
  return ((operands.data == nullptr || operands.dtype == kDType<T>) && ...);
}

template <class... Operands>
inline bool any_float64(const Operands&... operands) {
  return ((operands.data != nullptr && operands.dtype == DType::kFloat64) || ...);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
