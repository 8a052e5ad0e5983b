// SPDX-License-Identifier: BSD-3-Clause
// philox.h's stream of 16-bit draws, several blocks at a time.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// What one step of the widest instruction set writes: the memory for draws ends on a multiple of it.
inline constexpr std::int64_t kDrawsPerStep = 64;

constexpr std::int64_t padded_draws(std::int64_t count) {
  return (count + kDrawsPerStep - 1) / kDrawsPerStep * kDrawsPerStep;
}

// The draws of the blocks from `counter` on, `count` at least.
RESNORM_NOINLINE void draw_blocks(std::uint64_t seed, std::uint64_t counter, std::int64_t count, std::uint16_t* draws) {
  for (std::int64_t i = 0; i < count; i += UInt32Vec::kSize * philox::kElementsPerBlock, counter += UInt32Vec::kSize) {
    UInt32Vec c0 = UInt32Vec::counters(counter), c1 = c0.high(), c2 = UInt32Vec::broadcast(0), c3 = c2;
    auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
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

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
