// SPDX-License-Identifier: BSD-3-Clause
// The matrix products of attention: a few rows of words times panels of them. Queries times keys and probabilities
// times values are `multiply`; what sums over queries, as the gradients of keys and values do, is
// `add_product_over_rows`.
#pragma once

#include <cstdint>

#include "product_words.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Rows of the product that are made together: as many as have all their sums in registers, two vectors each.
inline constexpr int kGroupRows = Vec<float>::kSize == 16 ? 12 : Vec<float>::kSize == 8 ? 6 : 4;

// How a group's rows lie in memory, be they queries, scores or outputs: so many words of each row at most, then the
// rest below. The distance between rows is known to the compiler, so that one register addresses all of them, and it is
// no power of two, or they would fall into the same places of the first cache.
inline constexpr std::int64_t kChunkWords = 512;
inline constexpr std::int64_t kRowStride = kChunkWords + 16;
inline constexpr std::int64_t kChunkStride = kGroupRows * kRowStride;

// Where a word of the group's first row lies.
constexpr std::int64_t word_offset(std::int64_t word) { return word / kChunkWords * kChunkStride + word % kChunkWords; }

constexpr std::int64_t chunks_of(std::int64_t words) { return (words + kChunkWords - 1) / kChunkWords; }

// Sums of more words than this are sums of such pieces' sums, which round less. Those of scores in float32 are of
// shorter ones: their rounding is what is farthest from exact, the farther the fewer there are to average.
inline constexpr std::int64_t kProductPiece = 128;

template <class T>
constexpr std::int64_t score_piece(std::int64_t tokens) {
  if constexpr (!kSame<T, float>) return kProductPiece;
  return tokens < 32 ? 8 : 32;
}

// kRows rows and kPanels panels of the product. Sums of more than `piece` words are sums of such pieces' sums, which
// round less.
template <class Words, int kRows, int kPanels>
RESNORM_NOINLINE void multiply_tile(const float* left, const float* panels, std::int64_t panel_stride,
                                    std::int64_t depth, std::int64_t piece, bool add, float* result) {
  using V = Vec<float>;
  for (std::int64_t end = depth; end > 0; end -= piece, add = true) {
    V sums[kRows][kPanels] = {};
    const float* const last = left + (end < piece ? end : piece);
    for (; left != last; ++left, panels += V::kSize) {
      V right[kPanels];
      unrolled<kPanels>(
          [&](auto panel) RESNORM_INLINE_LAMBDA { right[panel] = V::load(panels + panel * panel_stride, AllLanes{}); });
      unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
        const V factor = V::broadcast(left[row * kRowStride]);
        unrolled<kPanels>([&](auto panel) RESNORM_INLINE_LAMBDA {
          sums[row][panel] = Words::multiply_add(factor, right[panel], sums[row][panel]);
        });
      });
    }
    unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
      unrolled<kPanels>([&](auto panel) RESNORM_INLINE_LAMBDA {
        float* to = result + row * kRowStride + panel * V::kSize;
        if (add) sums[row][panel] = V::load(to, AllLanes{}) + sums[row][panel];
        sums[row][panel].store(to, AllLanes{});
      });
    });
  }
}

// result = left * right: up to kGroupRows rows of `depth` words, as many chunks of them as that takes; `count` panels
// of a vector of columns each, panel_stride apart.
template <class Words>
inline void multiply(std::int64_t rows, const float* left, const float* panels, std::int64_t panel_stride,
                     std::int64_t count, std::int64_t depth, std::int64_t piece, float* result) {
  constexpr std::int64_t kSize = Vec<float>::kSize;
  with_count<kGroupRows>(rows, [&](auto tile_rows) RESNORM_INLINE_LAMBDA {
    for (std::int64_t word = 0; word < depth; word += kChunkWords) {
      const std::int64_t words = depth - word < kChunkWords ? depth - word : kChunkWords;
      const auto tile = [&](std::int64_t panel, auto panels_at_once) RESNORM_INLINE_LAMBDA {
        multiply_tile<Words, tile_rows, panels_at_once>(left + word_offset(word),
                                                        panels + panel * panel_stride + word * kSize, panel_stride,
                                                        words, piece, word > 0, result + word_offset(panel * kSize));
      };
      std::int64_t panel = 0;
      for (; panel + 2 <= count; panel += 2) tile(panel, Index<2>{});
      if (panel < count) tile(panel, Index<1>{});
    }
  });
}

// kRows columns of `left` as rows of the product, and kPanels panels, added to `sums`.
template <class Words, int kRows, int kPanels>
RESNORM_NOINLINE void add_tile_over_rows(const float* left, const float* panels, std::int64_t panel_stride,
                                         std::int64_t depth, float* sums, std::int64_t sums_stride) {
  using V = Vec<float>;
  V tile[kRows][kPanels] = {};
  for (std::int64_t word = 0; word < depth; ++word, left += kRowStride, panels += V::kSize) {
    V right[kPanels];
    unrolled<kPanels>([&](auto panel)
                          RESNORM_INLINE_LAMBDA { right[panel] = V::load(panels + panel * panel_stride, AllLanes{}); });
    unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
      const V factor = V::broadcast(left[row]);
      unrolled<kPanels>([&](auto panel) RESNORM_INLINE_LAMBDA {
        tile[row][panel] = Words::multiply_add(factor, right[panel], tile[row][panel]);
      });
    });
  }
  unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
    unrolled<kPanels>([&](auto panel) RESNORM_INLINE_LAMBDA {
      float* to = sums + row * sums_stride + panel * V::kSize;
      (V::load(to, AllLanes{}) + tile[row][panel]).store(to, AllLanes{});
    });
  });
}

// sums += left^T * right: `left` has `depth` rows of `columns` words, kRowStride apart; `right` is `count` panels of as
// many words, panel_stride apart; `sums` has `columns` rows of `count` vectors.
template <class Words>
inline void add_product_over_rows(std::int64_t columns, const float* left, const float* panels,
                                  std::int64_t panel_stride, std::int64_t count, std::int64_t depth, float* sums) {
  constexpr std::int64_t kSize = Vec<float>::kSize;
  const std::int64_t stride = count * kSize;
  for (std::int64_t column = 0; column < columns; column += kGroupRows) {
    with_count<kGroupRows>(columns - column, [&](auto tile_rows) RESNORM_INLINE_LAMBDA {
      const auto tile = [&](std::int64_t panel, auto panels_at_once) RESNORM_INLINE_LAMBDA {
        add_tile_over_rows<Words, tile_rows, panels_at_once>(left + column, panels + panel * panel_stride, panel_stride,
                                                             depth, sums + column * stride + panel * kSize, stride);
      };
      std::int64_t panel = 0;
      for (; panel + 2 <= count; panel += 2) tile(panel, Index<2>{});
      if (panel < count) tile(panel, Index<1>{});
    });
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
