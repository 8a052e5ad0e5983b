// SPDX-License-Identifier: BSD-3-Clause
// Which attention weights of a head dropout drops, as arguments.h numbers them.
#pragma once

#include <cstdint>

#include "philox_draws.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

class WeightDraws {
 public:
  // `draws` is memory for the rows that are used together, `pitch` draws each, a multiple of kDrawsPerStep.
  WeightDraws(const PackedAttention& a, std::int64_t sequence, std::int64_t head, std::uint16_t* draws,
              std::int64_t pitch)
      : threshold(a.dropout.threshold),
        seed_(a.dropout.seed),
        first_row_(a.cu_seqlens[sequence] * a.heads + head),
        heads_(a.heads),
        draws_(draws),
        pitch_(pitch) {}

  // The draws of `count` keys of a token from `key` on, a multiple of kElementsPerBlock. Tokens and keys are counted
  // within the sequence.
  const std::uint16_t* row(std::int64_t token, std::int64_t key, std::int64_t count, int slot) const {
    std::uint16_t* draws = draws_ + slot * pitch_;
    const auto row = static_cast<std::uint64_t>(first_row_ + token * heads_);
    draw_blocks(seed_, (row << 32) + static_cast<std::uint64_t>(key) / philox::kElementsPerBlock, count, draws);
    return draws;
  }

  const std::uint32_t threshold;

 private:
  std::uint64_t seed_;
  std::int64_t first_row_, heads_;
  std::uint16_t* draws_;
  std::int64_t pitch_;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
