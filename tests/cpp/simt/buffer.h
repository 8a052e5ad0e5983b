// SPDX-License-Identifier: BSD-3-Clause
// Global memory for the tests of kernels: NaN until written, aligned as cudaMalloc does, and of the exact size, so that
// AddressSanitizer sees one byte too many.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace resnorm::simt {

// `offset` elements before the first one break the alignment.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size, std::size_t offset = 0) : size_(size), offset_(offset) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, (size + offset) * sizeof(T)) != 0) throw std::bad_alloc();
    std::memset(memory, 0xFF, (size + offset) * sizeof(T));
    memory_.reset(static_cast<T*>(memory));
  }

  T* data() { return memory_.get() + offset_; }
  const T* data() const { return memory_.get() + offset_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return data()[i]; }
  const T& operator[](std::size_t i) const { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size_; }

 private:
  static constexpr std::size_t kAlignment = 256;

  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };

  std::size_t size_, offset_;
  std::unique_ptr<T, Free> memory_;
};

}  // namespace resnorm::simt
