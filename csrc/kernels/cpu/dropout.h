// SPDX-License-Identifier: BSD-3-Clause
// The 16-bit draws that decide which elements of a row dropout drops: philox.h's stream, several blocks at a time.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Makes the draws of whole rows, up to `slots` of them at a time. Vec::keep reads full vectors, so rows are padded.
class DropoutRows {
 public:
  DropoutRows(const Dropout& dropout, std::int64_t cols, RowBuffers& buffers, int slots = 1)
      : threshold(dropout.threshold), scale(dropout.scale), seed_(dropout.seed), cols_(cols) {
    pitch_ = (cols + philox::kElementsPerBlock + kPadding) / kPadding * kPadding + kPadding;
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
    draw(element / philox::kElementsPerBlock, offset + cols_, draws);
    return draws + offset;
  }

  const std::uint32_t threshold;
  const float scale;

 private:
  // What one step of the widest instruction set writes.
  static constexpr std::int64_t kPadding = 64;

  void draw(std::uint64_t counter, std::int64_t count, std::uint16_t* draws) const {
    for (std::int64_t i = 0; i < count;
         i += UInt32Vec::kSize * philox::kElementsPerBlock, counter += UInt32Vec::kSize) {
      UInt32Vec c0 = UInt32Vec::counters(counter), c1 = c0.high(), c2 = UInt32Vec::broadcast(0), c3 = c2;
      auto key0 = static_cast<std::uint32_t>(seed_), key1 = static_cast<std::uint32_t>(seed_ >> 32);
      for (int round = 0; round < philox::kRounds; ++round) {
        const UInt32Vec product0 = multiply(c0, UInt32Vec::broadcast(philox::kMultiplier0));
        const UInt32Vec product1 = multiply(c2, UInt32Vec::broadcast(philox::kMultiplier1));
        c0 = product1.high() ^ c1 ^ UInt32Vec::broadcast(key0);
        c2 = product0.high() ^ c3 ^ UInt32Vec::broadcast(key1);
        c1 = product1;
        c3 = product0;
        key0 += philox::kKeyIncrement0;
        key1 += philox::kKeyIncrement1;
      }
      UInt32Vec::store_blocks(c0, c1, c2, c3, draws + i);
    }
  }

  std::uint64_t seed_;
  std::int64_t cols_, pitch_;
  std::uint16_t* draws_;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
