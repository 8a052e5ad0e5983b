// SPDX-License-Identifier: BSD-3-Clause
// The softmax of attention, over one block of keys after another: probabilities without their denominators, which
// divide the output at last.
#pragma once

#include <cstdint>

#include "exp2.h"
#include "packed_attention_dropout.h"
#include "packed_attention_panels.h"
#include "packed_attention_product.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// What a group of rows has seen so far, as the next block continues it.
struct SoftmaxState {
  float largest[kGroupRows];      // score
  float denominator[kGroupRows];  // sum of 2^((score - largest) * scale)
  float rescale[kGroupRows];      // what sums over the blocks before this one are to be multiplied by
};

// Which keys of a block a group's rows see: with a causal mask each row one more than the row above it.
struct VisibleKeys {
  std::int64_t first_row;  // keys that the group's first row sees: may be below 0 or beyond the block's
  std::int64_t last_row;   // of the block's keys, those that the last row sees
  bool causal;

  RESNORM_INLINE std::int64_t of_row(std::int64_t row) const {
    if (!causal) return last_row;
    const std::int64_t visible = first_row + row;
    return visible < 0 ? 0 : visible < last_row ? visible : last_row;
  }
};

// A few rows side by side: alone each of them would wait for its largest score, exponential and sum in turn.
inline constexpr int kSoftmaxRows = Vec<float>::kSize == 16 ? 4 : 3;

// What is dropped of a group's rows in a block of keys.
struct DroppedWeights {
  const WeightDraws& draws;
  std::int64_t first_token, first_key;

  const std::uint16_t* row(int row, std::int64_t keys, int slot) const {
    return draws.row(first_token + row, first_key, keys, slot);
  }
};

// Rows `first` and below of a group's scores become probabilities, as words; those of hidden keys are 0, and so are the
// dropped ones, which the denominators count all the same.
template <class Words, int kRows, bool kDrops>
RESNORM_NOINLINE void softmax_rows(float* scores, int first, const VisibleKeys& keys, const DroppedWeights& dropped,
                                   float scale, bool first_block, SoftmaxState& state) {
  using V = Vec<float>;
  using Value = typename Words::Value;
  constexpr float kInfinity = __builtin_inff();
  const std::int64_t vectors = vectors_of(keys.last_row), full = keys.of_row(first) / V::kSize;
  const V scales = V::broadcast(scale);
  V largest[kRows], offset[kRows], sum[kRows];
  const auto lanes_of = [&](std::int64_t vector, int row) RESNORM_INLINE_LAMBDA {
    const std::int64_t visible = keys.of_row(first + row) - vector * V::kSize;
    return FirstLanes{static_cast<int>(visible < 0 ? 0 : visible < V::kSize ? visible : V::kSize)};
  };
  const auto load = [&](std::int64_t vector, int row) RESNORM_INLINE_LAMBDA {
    return V::load(scores + row * kRowStride + vector * V::kSize, AllLanes{});
  };
  const auto for_each_score = [&](const auto& whole, const auto& partial) RESNORM_INLINE_LAMBDA {
    for (std::int64_t vector = 0; vector < full; ++vector) {
      unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA { whole(vector, row); });
    }
    for (std::int64_t vector = full; vector < vectors; ++vector) {
      unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA { partial(vector, row, lanes_of(vector, row)); });
    }
  };
  scores += first * kRowStride;

  unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
    largest[row] = V::broadcast(first_block ? -kInfinity : state.largest[first + row]);
  });
  for_each_score([&](std::int64_t vector, auto row)
                     RESNORM_INLINE_LAMBDA { largest[row] = max(largest[row], load(vector, row)); },
                 [&](std::int64_t vector, auto row, FirstLanes lanes) RESNORM_INLINE_LAMBDA {
                   const V visible = load(vector, row).first_or(lanes, V::broadcast(-kInfinity));
                   largest[row] = max(largest[row], visible);
                 });

  unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
    const float now = largest[row].largest();
    // Where nothing but -Inf has been seen, every probability so far is 0, not NaN.
    const float finite = now == -kInfinity ? 0 : now;
    if (!first_block) {
      state.rescale[first + row] = exp2(V::broadcast((state.largest[first + row] - finite) * scale)).first();
    }
    state.largest[first + row] = now;
    offset[row] = V::broadcast(-finite * scale);
    sum[row] = V{};
  });
  const std::uint16_t* draws[kRows];
  if constexpr (kDrops) {
    for (int row = 0; row < kRows; ++row) draws[row] = dropped.row(first + row, keys.last_row, row);
  }
  const auto keep = [&](std::int64_t vector, auto row, V probabilities) RESNORM_INLINE_LAMBDA {
    sum[row] = sum[row] + probabilities;
    if constexpr (kDrops) probabilities = probabilities.keep(draws[row] + vector * V::kSize, dropped.draws.threshold);
    Words::store(probabilities, scores + row * kRowStride + vector * (V::kSize / Words::kValues));
  };
  for_each_score(
      [&](std::int64_t vector, auto row)
          RESNORM_INLINE_LAMBDA { keep(vector, row, exp2<Value>(fma(load(vector, row), scales, offset[row]))); },
      [&](std::int64_t vector, auto row, FirstLanes lanes) RESNORM_INLINE_LAMBDA {
        keep(vector, row, exp2<Value>(fma(load(vector, row), scales, offset[row])).only(lanes));
      });
  unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
    float& denominator = state.denominator[first + row];
    denominator = sum[row].sum() + (first_block ? 0 : denominator * state.rescale[first + row]);
  });
}

template <class Words>
inline void softmax(float* scores, std::int64_t rows, const VisibleKeys& keys, const DroppedWeights& dropped,
                    float scale, bool first_block, SoftmaxState& state) {
  for (std::int64_t row = 0; row < rows; row += kSoftmaxRows) {
    with_count<kSoftmaxRows>(rows - row, [&](auto count) RESNORM_INLINE_LAMBDA {
      with_flag(dropped.draws.threshold != 0, [&](auto drops) RESNORM_INLINE_LAMBDA {
        softmax_rows<Words, count, drops != 0>(scores, static_cast<int>(row), keys, dropped, scale, first_block, state);
      });
    });
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
