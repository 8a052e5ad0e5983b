// SPDX-License-Identifier: BSD-3-Clause
// Dropout by the draws that philox.h gives each element of the logical matrix, whatever vector holds it.
#pragma once

#include "../arguments.h"
#include "../philox.h"
#include "primitives.cuh"

namespace resnorm::cuda {

// values[i] belongs to element `first` + i: scaled where its draw is at least `threshold`, else exactly 0, even if it
// was Inf or NaN. `first` may be negative: a vector may begin before the first row, with elements that do not count.
// kAligned: it is a multiple of kCount, so that all draws come from one block.
template <bool kAligned, int kCount>
RESNORM_DEVICE void apply_dropout(float (&values)[kCount], std::int64_t first, std::uint64_t seed,
                                  std::uint32_t threshold, float scale) {
  static_assert(kCount == 1 || kCount == 4 || kCount == 8);
  constexpr int kPerBlock = philox::kElementsPerBlock;
  static_assert(kPerBlock == 8);
  const int skipped = static_cast<int>(first & 7);
  std::uint32_t words[8] = {};  // the draws of two blocks, two a word
  const auto fill = [&](int half, std::int64_t counter) {
    const philox::Block block = philox::block(static_cast<std::uint64_t>(counter), seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * half + i] = block.words[i];
  };
  fill(0, first >> 3);
  if (!kAligned && skipped + kCount > kPerBlock) fill(1, (first >> 3) + 1);

  // Shifts the draws of the elements before `first` out. By selects: an index unknown at compile time would put the
  // array into local memory.
  if constexpr (!kAligned || kCount < kPerBlock) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = (skipped & 4) != 0 ? words[i + 2] : words[i];
  }
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = (skipped & 2) != 0 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = (skipped & 1) != 0 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
  }

#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const std::uint32_t draw = i % 2 == 0 ? words[i / 2] & 0xFFFFU : words[i / 2] >> 16;
    values[i] = draw >= threshold ? values[i] * scale : 0.0F;
  }
}

// One value after dropout: exactly 0, or scaled.
template <class Value>
RESNORM_DEVICE Value dropped(Value value, std::int64_t element, std::uint64_t seed, const Dropout& dropout) {
  float scale[1] = {1.0F};
  apply_dropout<false>(scale, element, seed, dropout.threshold, dropout.scale);
  return scale[0] == 0.0F ? Value(0) : value * static_cast<Value>(scale[0]);
}

}  // namespace resnorm::cuda
