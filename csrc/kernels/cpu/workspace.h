// SPDX-License-Identifier: BSD-3-Clause
// How work and memory are dealt out to the kernels' loops.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resnorm::cpu {

// Fewer elements than this are one thread's work: starting a second costs more than it saves.
inline constexpr std::int64_t kElementsPerTask = 32 * 1024;

// Rows that a pass takes together: weight, bias and column sums are touched once for all of them, and one row's
// additions hide the latency of another's. More rows of a usual size would not fit the first cache.
inline constexpr int kRowsPerGroup = 2;

inline constexpr std::size_t kLineBytes = 64;

// Memory of the calling thread, of `bytes` bytes at least and aligned to lines, that lives on for its next task: rows
// that are too long for the stack cost no fresh pages at every call. A task's buffers differ in `index`: kernels count
// theirs from kFirstKernelBuffer on; the other is that of whoever calls several kernels one after another.
void* thread_buffer(std::size_t index, std::size_t bytes);

inline constexpr std::size_t kActivationsBuffer = 0, kFirstKernelBuffer = 1;

// Frees those of the calling thread, between its tasks; returns how many bytes they were.
std::size_t free_thread_buffers();

// What moves as many bytes writes past the caches. A line that is written into them is read first, and drives out what
// somebody may still want, which costs more than it saves long before the last cache is full: a core's share of that is
// what its neighbours leave, and systems report it wrongly to guests. So it is six times the second cache, which is a
// core's own. Measured on a Zen 4: with 16 MiB, half of its third cache, backward passes over 4096 rows of 256 take 1.6
// times as long.
std::int64_t non_temporal_bytes();

// A backward pass is cut into blocks of rows, whose column sums are merged in a fixed order afterwards. It depends on
// the sizes only, so that the sums repeat bitwise on any number of threads. A power of two: 1, 2, ... 64.
std::int64_t row_block_count(std::int64_t rows, std::int64_t cols);

// First row of a block; of the block behind the last: the number of rows.
std::int64_t row_block_begin(std::int64_t block, std::int64_t blocks, std::int64_t rows);

}  // namespace resnorm::cpu
