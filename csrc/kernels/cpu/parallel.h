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

// body(row, Index<kRows>) for groups of rows: whole ones, then single rows. Rows of doubles, which are rare, go one by
// one, and loops for more of them are not compiled.
template <class Acc, class Body>
RESNORM_INLINE void for_each_group(std::int64_t begin, std::int64_t end, const Body& body) {
  if constexpr (!kSame<Acc, double>) {
    for (; begin + kRowsPerGroup <= end; begin += kRowsPerGroup) body(begin, Index<kRowsPerGroup>{});
  }
  for (; begin < end; ++begin) body(begin, Index<1>{});
}

// body(Index<bypass>). Single rows, which are few, or rare where they are doubles, are not worth a loop of non-temporal
// stores.
template <int kRows, class Body>
RESNORM_INLINE void with_non_temporal(bool bypass, const Body& body) {
  if constexpr (kRows == 1) {
    body(Index<0>{});
  } else {
    with_flag(bypass, body);
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
