// SPDX-License-Identifier: BSD-3-Clause
// Rows that are needed soon. A core has a few loads from memory under way at a time, and the hardware's own prefetching
// stops at every page; the sweeps that read from the first cache only can ask for the next rows meanwhile.
#pragma once

#include <cstdint>

#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Whether matrices of these element types together are too large for the second caches of a few cores. Rows of smaller
// ones are near, and a prefetch that is not needed takes the place of a load.
template <class... T>
inline bool are_far(std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kNearBytes = 8 * 1024 * 1024;
  constexpr auto kBytes = static_cast<std::int64_t>((sizeof(T) + ...));
  return rows > kNearBytes / kBytes / cols;
}

// Asks for a line: into the second cache, because the first may be full of the rows at work.
RESNORM_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// The rows that come next, of a few matrices.
template <int kRows>
class NextRows {
 public:
  template <class... T>
  explicit NextRows(bool far, const T*... rows)
      : far_(far), rows_{reinterpret_cast<const char*>(rows)...}, sizes_{static_cast<std::int64_t>(sizeof(T))...} {}

  RESNORM_INLINE void prefetch_column(std::int64_t i) const {
    if (!far_) return;
    for (int k = 0; k < kRows; ++k) prefetch(rows_[k] + i * sizes_[k]);
  }

 private:
  bool far_;
  const char* rows_[kRows];
  std::int64_t sizes_[kRows];
};

template <class... T>
NextRows(bool, const T*...) -> NextRows<sizeof...(T)>;

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
