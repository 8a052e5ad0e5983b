// SPDX-License-Identifier: BSD-3-Clause
// The transpose of as many vectors of 32-bit words as a vector has lanes.
#pragma once

#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

#if defined(__AVX512F__)

// Within each 128-bit block first, then the blocks themselves.
RESNORM_INLINE void transpose(Vec<float> (&rows)[16]) {
  __m512 pairs[16], quads[16], halves[16];
  unrolled<8>([&](auto i) RESNORM_INLINE_LAMBDA {
    pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  });
  // quads[4 * g + c] holds columns c, 4 + c, 8 + c and 12 + c of rows 4 * g to 4 * g + 3.
  unrolled<4>([&](auto g) RESNORM_INLINE_LAMBDA {
    quads[4 * g] = _mm512_shuffle_ps(pairs[4 * g], pairs[4 * g + 2], 0x44);
    quads[4 * g + 1] = _mm512_shuffle_ps(pairs[4 * g], pairs[4 * g + 2], 0xEE);
    quads[4 * g + 2] = _mm512_shuffle_ps(pairs[4 * g + 1], pairs[4 * g + 3], 0x44);
    quads[4 * g + 3] = _mm512_shuffle_ps(pairs[4 * g + 1], pairs[4 * g + 3], 0xEE);
  });
  unrolled<4>([&](auto c) RESNORM_INLINE_LAMBDA {
    halves[c] = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    halves[4 + c] = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xDD);
    halves[8 + c] = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    halves[12 + c] = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xDD);
  });
  unrolled<4>([&](auto c) RESNORM_INLINE_LAMBDA {
    rows[c].v = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0xDD);
    rows[4 + c].v = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0x88);
    rows[12 + c].v = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0xDD);
  });
}

#elif defined(__AVX2__)

RESNORM_INLINE void transpose(Vec<float> (&rows)[8]) {
  __m256 pairs[8], quads[8];
  unrolled<4>([&](auto i) RESNORM_INLINE_LAMBDA {
    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  });
  // quads[4 * g + c] holds columns c and 4 + c of rows 4 * g to 4 * g + 3.
  unrolled<2>([&](auto g) RESNORM_INLINE_LAMBDA {
    quads[4 * g] = _mm256_shuffle_ps(pairs[4 * g], pairs[4 * g + 2], 0x44);
    quads[4 * g + 1] = _mm256_shuffle_ps(pairs[4 * g], pairs[4 * g + 2], 0xEE);
    quads[4 * g + 2] = _mm256_shuffle_ps(pairs[4 * g + 1], pairs[4 * g + 3], 0x44);
    quads[4 * g + 3] = _mm256_shuffle_ps(pairs[4 * g + 1], pairs[4 * g + 3], 0xEE);
  });
  unrolled<4>([&](auto c) RESNORM_INLINE_LAMBDA {
    rows[c].v = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
    rows[4 + c].v = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
  });
}

#else

template <int kSize>
RESNORM_INLINE void transpose(Vec<float> (&rows)[kSize]) {
  for (int row = 1; row < kSize; ++row) {
    for (int col = 0; col < row; ++col) {
      const float below = rows[row].v[col];
      rows[row].v[col] = rows[col].v[row];
      rows[col].v[row] = below;
    }
  }
}

#endif

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
