// SPDX-License-Identifier: BSD-3-Clause
// Elements in memory and in registers: vectors travel as raw 32-bit words (arrays of bfloat16 cost three byte
// permutations an element) and are float32 as soon as they are unpacked.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "primitives.cuh"

namespace resnorm::cuda {

template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) Words {
  std::uint32_t word[kBytes / 4];
};
template <>
struct Words<2> {
  std::uint16_t word[1];
};

template <int kBytes>
RESNORM_DEVICE Words<kBytes> zero_words() {
  Words<kBytes> words;
#pragma unroll
  for (auto& word : words.word) word = 0;
  return words;
}

// Words<kCount * sizeof(T)> from and to kCount float32 values.
template <class T>
struct ElementWords;

template <>
struct ElementWords<float> {
  template <int kCount>
  static RESNORM_DEVICE void unpack(const Words<kCount * 4>& words, float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = bits_to_float(words.word[i]);
  }
  template <int kCount>
  static RESNORM_DEVICE Words<kCount * 4> pack(const float (&values)[kCount]) {
    Words<kCount * 4> words;
#pragma unroll
    for (int i = 0; i < kCount; ++i) words.word[i] = float_to_bits(values[i]);
    return words;
  }
};

template <>
struct ElementWords<__nv_bfloat16> {
  template <int kCount>
  static RESNORM_DEVICE void unpack(const Words<kCount * 2>& words, float (&values)[kCount]) {
    if constexpr (kCount == 1) {
      values[0] = bits_to_float(static_cast<std::uint32_t>(words.word[0]) << 16);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        values[2 * i] = bits_to_float(words.word[i] << 16);
        values[2 * i + 1] = bits_to_float(words.word[i] & 0xFFFF0000U);
      }
    }
  }
  template <int kCount>
  static RESNORM_DEVICE Words<kCount * 2> pack(const float (&values)[kCount]) {
    Words<kCount * 2> words;
    if constexpr (kCount == 1) {
      const __nv_bfloat16 half = __float2bfloat16_rn(values[0]);
      __builtin_memcpy(&words.word[0], &half, 2);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        __builtin_memcpy(&words.word[i], &pair, 4);
      }
    }
    return words;
  }
};

template <>
struct ElementWords<__half> {
  template <int kCount>
  static RESNORM_DEVICE void unpack(const Words<kCount * 2>& words, float (&values)[kCount]) {
    if constexpr (kCount == 1) {
      __half half;
      __builtin_memcpy(static_cast<void*>(&half), &words.word[0], 2);
      values[0] = __half2float(half);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        __half2 pair;
        __builtin_memcpy(static_cast<void*>(&pair), &words.word[i], 4);
        values[2 * i] = __low2float(pair);
        values[2 * i + 1] = __high2float(pair);
      }
    }
  }
  template <int kCount>
  static RESNORM_DEVICE Words<kCount * 2> pack(const float (&values)[kCount]) {
    Words<kCount * 2> words;
    if constexpr (kCount == 1) {
      const __half half = __float2half_rn(values[0]);
      __builtin_memcpy(&words.word[0], &half, 2);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        __builtin_memcpy(&words.word[i], &pair, 4);
      }
    }
    return words;
  }
};

}  // namespace resnorm::cuda
