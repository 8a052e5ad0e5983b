// SPDX-License-Identifier: BSD-3-Clause
// What matrix products multiply: 32-bit words, which are floats or, where the CPU multiplies these directly, pairs of
// bfloat16. Both are moved about as float; only the functions here look inside.
#pragma once

#include <cstdint>

#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

struct FloatWords {
  using Value = float;
  static constexpr int kValues = 1;  // of a word

  // The word at `from`, in all lanes.
  static RESNORM_INLINE Vec<float> broadcast(const float* from) { return Vec<float>::broadcast(*from); }

  // Words of values that lie side by side.
  template <class T, class Lanes>
  static RESNORM_INLINE Vec<float> load(const T* from, Lanes lanes) {
    return Vec<float>::load(from, lanes);
  }

  // Words of kValues rows, a value of each; rows from `rows` on are zeros.
  template <class T, class Lanes>
  static RESNORM_INLINE Vec<float> interleave(const T* from, std::int64_t /*stride*/, std::int64_t /*rows*/,
                                              Lanes lanes) {
    return Vec<float>::load(from, lanes);
  }

  // Words of a value of each row.
  static RESNORM_INLINE Vec<float> interleave(const Vec<float> (&rows)[kValues]) { return rows[0]; }

  // The values of `vector` as words that lie side by side.
  static RESNORM_INLINE void store(Vec<float> vector, float* to) { vector.store(to, AllLanes{}); }

  // sum + a * b, value by value.
  static RESNORM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) { return fma(a, b, sum); }
};

// Which words hold an element type.
template <class T>
struct WordsOf {
  using Type = FloatWords;
};

#if defined(__AVX512BF16__)

struct BFloat16Pairs {
  using Value = BFloat16;
  static constexpr int kValues = 2;

  static RESNORM_INLINE Vec<float> broadcast(const BFloat16* from) {
    int word;
    __builtin_memcpy(&word, from, sizeof(word));
    return {_mm512_castsi512_ps(_mm512_set1_epi32(word))};
  }
  // A word of which there is the first value only.
  static RESNORM_INLINE Vec<float> broadcast_half(const BFloat16* from) {
    unsigned short value;
    __builtin_memcpy(&value, from, sizeof(value));
    return {_mm512_castsi512_ps(_mm512_set1_epi32(value))};
  }

  static RESNORM_INLINE Vec<float> load(const BFloat16* from, AllLanes) {
    return {_mm512_castsi512_ps(_mm512_loadu_si512(from))};
  }
  static RESNORM_INLINE Vec<float> load(const BFloat16* from, FirstLanes values) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1U << values.count) - 1U, from))};
  }

  template <class Lanes>
  static RESNORM_INLINE Vec<float> interleave(const BFloat16* from, std::int64_t stride, std::int64_t rows,
                                              Lanes lanes) {
    const __m512i low = _mm512_cvtepu16_epi32(load16(from, lanes));
    if (rows == 1) return {_mm512_castsi512_ps(low)};
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(from + stride, lanes)), 16);
    return {_mm512_castsi512_ps(_mm512_or_si512(low, high))};
  }

  static RESNORM_INLINE Vec<float> interleave(const Vec<float> (&rows)[kValues]) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rows[0].v)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rows[1].v)));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }

  // Not BFloat16's own rounding, which spares subnormal numbers: the product takes them for 0.
  static RESNORM_INLINE void store(Vec<float> vector, float* to) {
    _mm256_storeu_ps(to, reinterpret_cast<__m256>(_mm512_cvtneps_pbh(vector.v)));
  }

  static RESNORM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
};

template <>
struct WordsOf<BFloat16> {
  using Type = BFloat16Pairs;
};

#endif

template <class Words>
constexpr std::int64_t words_of(std::int64_t values) {
  return (values + Words::kValues - 1) / Words::kValues;
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
