// SPDX-License-Identifier: BSD-3-Clause
// Rows that lie gigabytes from the beginning of their matrix, and from each other.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "../matrix.h"

namespace resnorm::cuda::testing {

// The rows of `near`, the first at `first_element` of the far matrix, and one every `row_stride` elements. Of its
// address space only the pages with those rows exist: to touch another one is a segmentation fault.
class FarRows {
 public:
  FarRows(cpu::testing::Matrix& near, std::int64_t first_element, std::int64_t row_stride)
      : near_(near), first_element_(first_element), row_stride_(row_stride) {
    if (!near.present()) return;
    bytes_ = round_up(end_of(near.rows() - 1));
    void* const mapping = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<unsigned char*>(mapping);
    for (std::int64_t row = 0; row < near.rows(); ++row) {
      const std::size_t begin = begin_of(row) / kPageBytes * kPageBytes;
      if (mprotect(data_ + begin, round_up(end_of(row)) - begin, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
      for (std::int64_t col = 0; col < near.cols(); ++col) {
        cpu::testing::write(data_, element(row) + col, near.dtype(), near(row, col));
      }
    }
  }
  ~FarRows() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  FarRows(const FarRows&) = delete;
  FarRows& operator=(const FarRows&) = delete;

  // Of the far matrix; null where `near` is absent.
  void* data() const { return data_; }

  void copy_back() {
    if (!near_.present()) return;
    for (std::int64_t row = 0; row < near_.rows(); ++row) {
      for (std::int64_t col = 0; col < near_.cols(); ++col) {
        near_.set(row, col, cpu::testing::read(data_, element(row) + col, near_.dtype()));
      }
    }
  }

 private:
  static constexpr std::size_t kPageBytes = 4096;

  static std::size_t round_up(std::size_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }
  std::int64_t element(std::int64_t row) const { return first_element_ + row * row_stride_; }
  std::size_t begin_of(std::int64_t row) const {
    return static_cast<std::size_t>(element(row) * size_of(near_.dtype()));
  }
  std::size_t end_of(std::int64_t row) const {
    return static_cast<std::size_t>((element(row) + near_.cols()) * size_of(near_.dtype()));
  }

  cpu::testing::Matrix& near_;
  std::int64_t first_element_, row_stride_;
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace resnorm::cuda::testing
