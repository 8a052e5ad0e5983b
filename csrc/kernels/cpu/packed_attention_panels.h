// SPDX-License-Identifier: BSD-3-Clause
// The operands of attention's products, converted to words and laid out as the products read them.
#pragma once

#include <cstdint>

#include "packed_attention_product.h"
#include "product_words.h"
#include "simd.h"
#include "transpose.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

constexpr std::int64_t vectors_of(std::int64_t values) { return (values + Vec<float>::kSize - 1) / Vec<float>::kSize; }

// Whether queries, not scores, are multiplied by the scale: then no score is rounded after its row's largest has been
// subtracted, and the largest's exponential is exactly 1. Words of bfloat16 would round the product.
template <class Words>
inline constexpr bool kScalesQueries = Words::kValues == 1;

// body(i, lanes) for every vector of words that a row of values makes up; lanes of the last one are counted in values.
template <class Words, class Body>
RESNORM_INLINE void for_each_word_vector(std::int64_t values, const Body& body) {
  constexpr std::int64_t kStep = Vec<float>::kSize * Words::kValues;
  std::int64_t i = 0;
  for (; i + kStep <= values; i += kStep) body(i, AllLanes{});
  if (kStep > 1 && i < values) body(i, FirstLanes{static_cast<int>(values - i)});
}

// Exponentials are powers of two, so scores are multiplied by log2(e) too.
inline float score_scale(const PackedAttention& a) {
  constexpr double kLog2E = 1.4426950408889634;
  return static_cast<float>(a.scale * kLog2E);
}

// What is left of it to do for scores of copied queries.
template <class Words>
constexpr float scale_of_scores(float scale) {
  return kScalesQueries<Words> ? 1 : scale;
}

template <class Words, class T>
RESNORM_NOINLINE void copy_queries(const T* queries, std::int64_t stride, std::int64_t count, std::int64_t head_dim,
                                   float scale, float* rows) {
  for (std::int64_t query = 0; query < count; ++query, queries += stride, rows += kRowStride) {
    for_each_word_vector<Words>(head_dim, [&](std::int64_t i, auto lanes) RESNORM_INLINE_LAMBDA {
      Vec<float> words = Words::load(queries + i, lanes);
      if constexpr (kScalesQueries<Words>) words = words * Vec<float>::broadcast(scale);
      words.store(rows + word_offset(i / Words::kValues), AllLanes{});
    });
  }
}

// Panels of a vector of keys each, word by word. The last panel is filled up with its last key.
template <class Words, class T>
RESNORM_NOINLINE void pack_keys(const T* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim,
                                float* panels) {
  using V = Vec<float>;
  const std::int64_t depth = words_of<Words>(head_dim);
  for (std::int64_t first = 0; first < count; first += V::kSize, panels += depth * V::kSize) {
    const T* rows[V::kSize];
    unrolled<V::kSize>([&](auto row) RESNORM_INLINE_LAMBDA {
      rows[row] = keys + (first + row < count ? first + row : count - 1) * stride;
    });
    for_each_word_vector<Words>(head_dim, [&](std::int64_t i, auto lanes) RESNORM_INLINE_LAMBDA {
      const std::int64_t word = i / Words::kValues;
      V block[V::kSize];
      unrolled<V::kSize>([&](auto row) RESNORM_INLINE_LAMBDA { block[row] = Words::load(rows[row] + i, lanes); });
      transpose(block);
      unrolled<V::kSize>([&](auto row) RESNORM_INLINE_LAMBDA {
        if (word + row < depth) block[row].store(panels + (word + row) * V::kSize, AllLanes{});
      });
    });
  }
}

// Panels of a vector of the head's dimensions each, word by word of the keys.
template <class Words, class T>
RESNORM_NOINLINE void pack_values(const T* values, std::int64_t stride, std::int64_t count, std::int64_t head_dim,
                                  std::int64_t panel_stride, float* panels) {
  using V = Vec<float>;
  for (std::int64_t first = 0; first < count; first += Words::kValues, panels += V::kSize) {
    const T* row = values + first * stride;
    for_each_vector<float, 1>(head_dim, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
      Words::interleave(row + i, stride, count - first, lanes).store(panels + i / V::kSize * panel_stride, AllLanes{});
    });
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
