// SPDX-License-Identifier: BSD-3-Clause
// Philox-4x32-10, the counter-based random numbers of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2,
// 3"): the same stream on CPU and GPU, so a dropout mask is a pure function of (seed, element index) and nothing but
// the seed is stored for the backward pass.
//
// Element e takes half-word e mod 8, low half first, of the four words at counter e / 8: one call serves eight
// elements.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace resnorm::philox {

inline constexpr int kElementsPerBlock = 8;
inline constexpr int kRounds = 10;
inline constexpr std::uint32_t kMultiplier0 = 0xD2511F53U;
inline constexpr std::uint32_t kMultiplier1 = 0xCD9E8D57U;
inline constexpr std::uint32_t kKeyIncrement0 = 0x9E3779B9U;
inline constexpr std::uint32_t kKeyIncrement1 = 0xBB67AE85U;

struct Block {
  std::uint32_t words[4];
};

// static: each translation unit keeps its own copy, so none compiled for a newer instruction set can be linked for all.
static RESNORM_HOST_DEVICE inline Block block(std::uint64_t counter, std::uint64_t key) {
  std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32);
  std::uint32_t c2 = 0, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(kMultiplier0) * c0;
    const std::uint64_t product1 = static_cast<std::uint64_t>(kMultiplier1) * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(product1);
    c3 = static_cast<std::uint32_t>(product0);
    c0 = n0;
    c2 = n2;
    k0 += kKeyIncrement0;
    k1 += kKeyIncrement1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace resnorm::philox
