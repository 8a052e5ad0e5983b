// SPDX-License-Identifier: BSD-3-Clause
// Vectors of a row. Where rows do not start at multiples of a vector (odd sizes, offset bases), vectors lie at
// multiples in memory, so that a row's first and last may reach beyond it: of those, element by element, only what
// belongs to the row is touched.
#pragma once

#include "words.cuh"

namespace resnorm::cuda {

// The elements of columns [column, column + kVector), which `from` points at, 0 outside [0, cols). kShifted: a vector
// may reach beyond the row. Column: int where it holds a row's length.
template <class T, int kVector, bool kShifted, class Column>
RESNORM_DEVICE Words<kVector * sizeof(T)> load_vector(const T* from, Column column, Column cols) {
  using Vector = Words<kVector * sizeof(T)>;
  if constexpr (kShifted) {
    if (column < 0 || column + kVector > cols) {
      Vector vector = zero_words<sizeof(Vector)>();
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < 0 || column + i >= cols) continue;
        const auto element = load_once<Words<sizeof(T)>>(from + i);
        if constexpr (sizeof(T) == 4) {
          vector.word[i] = element.word[0];
        } else {
          vector.word[i / 2] |= static_cast<std::uint32_t>(element.word[0]) << (i % 2 * 16);
        }
      }
      return vector;
    }
  }
  return column < cols ? load_once<Vector>(from) : zero_words<sizeof(Vector)>();
}

template <class T, int kVector, bool kShifted, class Column>
RESNORM_DEVICE void store_vector(T* to, Column column, Column cols, const float (&values)[kVector]) {
  const auto vector = ElementWords<T>::template pack<kVector>(values);
  if constexpr (kShifted) {
    if (column < 0 || column + kVector > cols) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < 0 || column + i >= cols) continue;
        Words<sizeof(T)> element;
        if constexpr (sizeof(T) == 4) {
          element.word[0] = vector.word[i];
        } else {
          element.word[0] = static_cast<std::uint16_t>(vector.word[i / 2] >> (i % 2 * 16));
        }
        store(to + i, element);
      }
      return;
    }
  }
  if (column < cols) store(to, vector);
}

// A weight or bias, of type T or float32, by columns. Not shifted with the rows, so a shifted vector is gathered.
// kOverlaps: as for load_kept.
template <class T, int kVector, bool kShifted, bool kOverlaps, class Column>
RESNORM_DEVICE void load_parameter(const void* parameter, bool is_float32, Column column, Column cols,
                                   float (&values)[kVector]) {
  const auto load = [&]<class P>(const P* from) {
    if constexpr (!kShifted) {
      ElementWords<P>::template unpack<kVector>(load_kept<Words<kVector * sizeof(P)>, kOverlaps>(from + column),
                                                values);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float value[1] = {0.0F};
        if (column + i >= 0 && column + i < cols) {
          ElementWords<P>::template unpack<1>(load_kept<Words<sizeof(P)>, kOverlaps>(from + column + i), value);
        }
        values[i] = value[0];
      }
    }
  };
  if (is_float32) {
    load(static_cast<const float*>(parameter));
  } else {
    load(static_cast<const T*>(parameter));
  }
}

}  // namespace resnorm::cuda
