// SPDX-License-Identifier: BSD-3-Clause
// The 16-bit draws that decide which elements of a row dropout drops.
#pragma once

#include <cstdint>

#include "philox_draws.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Makes the draws of whole rows, up to `slots` of them at a time. Vec::keep reads full vectors, so rows are padded.
class DropoutRows {
 public:
  DropoutRows(const Dropout& dropout, std::int64_t cols, RowBuffers& buffers, int slots = 1)
      : threshold(dropout.threshold), scale(dropout.scale), seed_(dropout.seed), cols_(cols) {
    pitch_ = padded_draws(cols + philox::kElementsPerBlock) + kDrawsPerStep;
    draws_ = buffers.take<std::uint16_t>(threshold == 0 ? pitch_ : pitch_ * slots);
    // Without dropout nothing is below the threshold, whatever the draws: but they must be something.
    if (threshold == 0) __builtin_memset(draws_, 0, static_cast<std::size_t>(pitch_) * sizeof(std::uint16_t));
  }

  // draws[column] for every column of the row.
  const std::uint16_t* row(std::int64_t row, int slot = 0) const {
    if (threshold == 0) return draws_;
    std::uint16_t* draws = draws_ + slot * pitch_;
    const auto element = static_cast<std::uint64_t>(row) * static_cast<std::uint64_t>(cols_);
    const auto offset = static_cast<std::int64_t>(element % philox::kElementsPerBlock);
    draw_blocks(seed_, element / philox::kElementsPerBlock, offset + cols_, draws);
    return draws + offset;
  }

  const std::uint32_t threshold;
  const float scale;

 private:
  std::uint64_t seed_;
  std::int64_t cols_, pitch_;
  std::uint16_t* draws_;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
