// SPDX-License-Identifier: BSD-3-Clause
// output = activation(input * weight^T + bias), with the weight in panels of a few vectors of output columns each, word
// by word of the input: a product reads its weight once, from the first byte to the last, however few the rows are.
//
// Each element is one sum in one order, so that neither threads nor the other rows of a batch change its bits.
#pragma once

#include <cstdint>

#include "activation.h"
#include "loops.h"
#include "parallel.h"
#include "product_words.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// A tile of the product has all its sums in registers.
inline constexpr int kTileVectors = 3, kTileRows = Vec<float>::kSize == 16 ? 8 : 4;
inline constexpr std::int64_t kPanelCols = kTileVectors * Vec<float>::kSize;

// Rows that go through a panel while it is in the second cache.
inline constexpr std::int64_t kChunkRows = 64;

// How many words ahead the weight is prefetched: a few rows use it up faster than the hardware's own prefetching brings
// it from memory.
inline constexpr std::int64_t kPrefetchedWords = 64;

// Multiplications that are worth a thread.
inline constexpr std::int64_t kMultiplicationsPerTask = 512 * 1024;

constexpr std::int64_t panels_of(std::int64_t cols) { return (cols + kPanelCols - 1) / kPanelCols; }

template <class T>
constexpr std::int64_t panel_words(std::int64_t in_features) {
  return words_of<typename WordsOf<T>::Type>(in_features) * kPanelCols;
}

// Whether words hold T as it is, so that a prepacked weight is as exact, and no larger, than the weight.
template <class T>
constexpr bool kPrepacksExactly = sizeof(T) * WordsOf<T>::Type::kValues == sizeof(float);

template <class T>
void prepack_weight_as(const PrepackWeight& a, ParallelFor parallel_for) {
  constexpr int kValues = WordsOf<T>::Type::kValues;
  parallel(parallel_for, panels_of(a.out_features), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      T* const to = reinterpret_cast<T*>(static_cast<float*>(a.prepacked) + panel * panel_words<T>(a.in_features));
      __builtin_memset(to, 0, panel_words<T>(a.in_features) * sizeof(float));
      for (std::int64_t col = 0; col < kPanelCols && panel * kPanelCols + col < a.out_features; ++col) {
        const T* from = static_cast<const T*>(a.weight.data) + (panel * kPanelCols + col) * a.weight.row_stride;
        for (std::int64_t i = 0; i < a.in_features; ++i) {
          to[(i / kValues * kPanelCols + col) * kValues + i % kValues] = from[i];
        }
      }
    }
  });
}

// The sums of kRows rows and one panel.
template <int kRows, class T>
RESNORM_NOINLINE void multiply_panel(const T* input, std::int64_t stride, std::int64_t values, const float* panel,
                                     float* sums) {
  using V = Vec<float>;
  using Words = typename WordsOf<T>::Type;
  V tile[kRows][kTileVectors] = {};
  const auto add = [&](const auto& factor) RESNORM_INLINE_LAMBDA {
    V weights[kTileVectors];
    unrolled<kTileVectors>([&](auto v) RESNORM_INLINE_LAMBDA {
      weights[v] = V::load(panel + v * V::kSize, AllLanes{});
      prefetch(panel + kPrefetchedWords * kPanelCols + v * V::kSize);
    });
    unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
      const V word = factor(row);
      unrolled<kTileVectors>(
          [&](auto v) RESNORM_INLINE_LAMBDA { tile[row][v] = Words::multiply_add(word, weights[v], tile[row][v]); });
    });
    panel += kPanelCols;
  };
  std::int64_t i = 0;
  for (; i + Words::kValues <= values; i += Words::kValues) {
    add([&](auto row) RESNORM_INLINE_LAMBDA { return Words::broadcast(input + row * stride + i); });
  }
  if constexpr (Words::kValues > 1) {
    if (i < values)
      add([&](auto row) RESNORM_INLINE_LAMBDA { return Words::broadcast_half(input + row * stride + i); });
  }
  unrolled<kRows>([&](auto row) RESNORM_INLINE_LAMBDA {
    unrolled<kTileVectors>(
        [&](auto v) RESNORM_INLINE_LAMBDA { tile[row][v].store(sums + row * kPanelCols + v * V::kSize, AllLanes{}); });
  });
}

struct Identity {
  template <class T>
  static RESNORM_INLINE Vec<float> value(Vec<float> x) {
    return x;
  }
};

template <class Activate, class T>
void prepacked_linear_as(const PrepackedLinear& a, ParallelFor parallel_for) {
  using V = Vec<float>;
  const std::int64_t panels = panels_of(a.out_features), chunks = (a.rows + kChunkRows - 1) / kChunkRows;
  const std::int64_t task_rows = a.rows < kChunkRows ? a.rows : kChunkRows;
  const std::int64_t grain = kMultiplicationsPerTask / (task_rows * kPanelCols * a.cols + 1) + 1;
  parallel(parallel_for, chunks * panels, grain, [&](std::int64_t begin, std::int64_t end) {
    RowBuffers buffers;
    const float* bias = vector_or(a.bias, 0.0F, a.out_features, buffers);
    alignas(kLineBytes) float sums[kTileRows * kPanelCols];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t chunk = task / panels, panel = task % panels, first_col = panel * kPanelCols;
      const float* const weights = static_cast<const float*>(a.prepacked) + panel * panel_words<T>(a.cols);
      const std::int64_t cols = a.out_features - first_col < kPanelCols ? a.out_features - first_col : kPanelCols;
      const std::int64_t end_row = (chunk + 1) * kChunkRows < a.rows ? (chunk + 1) * kChunkRows : a.rows;
      for (std::int64_t row = chunk * kChunkRows; row < end_row; row += kTileRows) {
        const std::int64_t rows = end_row - row < kTileRows ? end_row - row : kTileRows;
        const T* input = static_cast<const T*>(a.input.data) + row * a.input.row_stride;
        with_count<kTileRows>(rows, [&](auto count) RESNORM_INLINE_LAMBDA {
          multiply_panel<count>(input, a.input.row_stride, a.cols, weights, sums);
        });
        for (std::int64_t k = 0; k < rows; ++k) {
          T* to = static_cast<T*>(a.output.data) + (row + k) * a.output.row_stride + first_col;
          for_each_vector<float, 1>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
            const V sum = V::load(sums + k * kPanelCols + i, lanes) + V::load(bias + first_col + i, lanes);
            Activate::template value<T>(sum).store(to + i, lanes);
          });
        }
      }
    }
  });
}

template <class T>
void prepacked_linear_with(const PrepackedLinear& a, ParallelFor parallel_for) {
  if (a.activation == Activation::kNone) return prepacked_linear_as<Identity, T>(a, parallel_for);
  visit(a.activation, [&](auto tag) { prepacked_linear_as<typename decltype(tag)::Type, T>(a, parallel_for); });
}

// Calls f with the Tag of `dtype`, if it packs exactly; returns whether it does.
template <class F>
inline bool with_prepacked_type(DType dtype, const F& f) {
  if constexpr (kHasLoops<float>) {
    if (dtype == DType::kFloat32) {
      f(Tag<float>{});
      return true;
    }
  }
  if constexpr (kPrepacksExactly<BFloat16>) {
    if (dtype == DType::kBFloat16) {
      f(Tag<BFloat16>{});
      return true;
    }
  }
  return false;
}

// Whether the kernels for `dtype` are those of the set that this one extends.
constexpr bool is_the_bases(DType dtype) { return kExtends && dtype != DType::kBFloat16; }

inline std::size_t prepacked_weight_bytes(DType dtype, std::int64_t out_features, std::int64_t in_features) {
  if (is_the_bases(dtype)) return base::linear_kernels.prepacked_weight_bytes(dtype, out_features, in_features);
  std::size_t bytes = 0;
  with_prepacked_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    bytes = static_cast<std::size_t>(panels_of(out_features) * panel_words<T>(in_features)) * sizeof(float);
  });
  return bytes;
}

inline void prepack_weight(const PrepackWeight& a, ParallelFor parallel_for) {
  if (is_the_bases(a.weight.dtype)) return base::linear_kernels.prepack_weight(a, parallel_for);
  with_prepacked_type(a.weight.dtype,
                      [&](auto tag) { prepack_weight_as<typename decltype(tag)::Type>(a, parallel_for); });
}

inline void prepacked_linear(const PrepackedLinear& a, ParallelFor parallel_for) {
  if (is_the_bases(a.input.dtype)) return base::linear_kernels.prepacked_linear(a, parallel_for);
  with_prepacked_type(a.input.dtype,
                      [&](auto tag) { prepacked_linear_with<typename decltype(tag)::Type>(a, parallel_for); });
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
