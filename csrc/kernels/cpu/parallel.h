// SPDX-License-Identifier: BSD-3-Clause
// How work is cut for threads.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "simd.h"
#include "workspace.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class Body>
inline void parallel(ParallelFor parallel_for, std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= grain) return body(0, count);
  parallel_for(
      count, grain,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

// body(begin, end) over ranges of rows, each worth a thread's while.
template <class Body>
inline void parallel_rows(ParallelFor parallel_for, std::int64_t rows, std::int64_t cols, const Body& body) {
  parallel(parallel_for, rows, (kElementsPerTask + cols - 1) / cols, body);
}

// Whether a matrix of T is too large for a second cache: then rows are worth prefetching. Nearer ones are not, a
// prefetch takes the place of a load.
template <class T>
inline bool is_far(std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kSecondCacheBytes = 2 * 1024 * 1024;
  return rows * cols > kSecondCacheBytes / static_cast<std::int64_t>(sizeof(T));
}

// body(row, Index<count>) over groups of rows: four at a time, then one by one.
template <class Body>
RESNORM_INLINE void for_each_row_group(std::int64_t begin, std::int64_t end, const Body& body) {
  std::int64_t row = begin;
  for (; row + kRowsPerGroup <= end; row += kRowsPerGroup) body(row, Index<kRowsPerGroup>{});
  for (; row < end; ++row) body(row, Index<1>{});
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
