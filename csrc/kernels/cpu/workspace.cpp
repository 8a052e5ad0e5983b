// SPDX-License-Identifier: BSD-3-Clause
#include "workspace.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace resnorm::cpu {

namespace {

constexpr std::int64_t kMaxRowBlocks = 64;

std::int64_t row_groups(std::int64_t rows) { return (rows + kRowsPerGroup - 1) / kRowsPerGroup; }

struct Buffer {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};
  std::size_t bytes = 0;
};

thread_local std::vector<Buffer> buffers;

}  // namespace

void* thread_buffer(std::size_t index, std::size_t bytes) {
  if (index >= buffers.size()) buffers.resize(index + 1);
  Buffer& buffer = buffers[index];
  if (buffer.bytes < bytes) {
    buffer.bytes = 0;
    buffer.memory.reset(std::aligned_alloc(kLineBytes, (bytes + kLineBytes - 1) / kLineBytes * kLineBytes));
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return buffer.memory.get();
}

std::int64_t non_temporal_bytes() {
  static const std::int64_t bytes = [] {
    constexpr std::int64_t kLeast = 1024 * 1024, kMost = 4 * 1024 * 1024;  // where a system says nothing, or nonsense
    return 6 * std::clamp<std::int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), kLeast, kMost);
  }();
  return bytes;
}

std::size_t free_thread_buffers() {
  std::size_t bytes = 0;
  for (const Buffer& buffer : buffers) bytes += buffer.bytes;
  buffers.clear();
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

}  // namespace resnorm::cpu
