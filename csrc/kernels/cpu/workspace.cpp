// SPDX-License-Identifier: BSD-3-Clause
#include "workspace.h"

#include <unistd.h>

#include <algorithm>
#include <memory>

#include "kernels.h"

namespace resnorm::cpu {

namespace {

constexpr std::int64_t kMaxRowBlocks = 64;

// Where the system does not know, or counts another level.
constexpr long kLeastLastCacheBytes = 8L * 1024 * 1024;

std::int64_t row_groups(std::int64_t rows) { return (rows + kRowsPerGroup - 1) / kRowsPerGroup; }

}  // namespace

std::int64_t streamed_bytes() {
  // Half of the last cache: the other half holds what the result is made from.
  static const std::int64_t bytes = std::max(sysconf(_SC_LEVEL3_CACHE_SIZE), kLeastLastCacheBytes) / 2;
  return bytes;
}

std::int64_t row_block_count(std::int64_t rows, std::int64_t cols) {
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(kElementsPerTask / std::max<std::int64_t>(cols, 1), kRowsPerGroup);
  std::int64_t blocks = 1;
  while (blocks < kMaxRowBlocks && 2 * blocks * rows_per_task <= rows) blocks *= 2;
  return blocks;
}

std::int64_t row_block_begin(std::int64_t block, std::int64_t blocks, std::int64_t rows) {
  return std::min(rows, row_groups(rows) * block / blocks * kRowsPerGroup);
}

std::size_t backward_workspace_bytes(std::int64_t rows, std::int64_t cols, int column_sums, DType dtype) {
  const std::size_t element = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<std::size_t>(row_block_count(rows, cols)) * column_sums * static_cast<std::size_t>(cols) * element;
}

void* thread_workspace(std::size_t bytes) {
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  static thread_local std::unique_ptr<Line[]> memory;
  static thread_local std::size_t lines = 0;
  const std::size_t wanted = (bytes + sizeof(Line) - 1) / sizeof(Line);
  if (wanted > lines) {
    memory.reset();
    memory.reset(new Line[wanted]);
    lines = wanted;
  }
  return memory.get();
}

}  // namespace resnorm::cpu
