// SPDX-License-Identifier: BSD-3-Clause
// Two to the power of a vector that is nowhere above 0, as a softmax needs it.
#pragma once

#include <cstdint>

#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// 2^x for |x| <= 1/2, and exactly 1 at 0: within 1.6e-8 of it, relatively, or within 2.9e-6 where the result is for
// BFloat16; roundings come on top.
template <class T>
RESNORM_INLINE Vec<float> exp2_polynomial(Vec<float> x) {
  using V = Vec<float>;
  if constexpr (kSame<T, BFloat16>) {
    V sum = fma(V::broadcast(0x1.3a02ccp-7F), x, V::broadcast(0x1.c9fc46p-5F));
    sum = fma(sum, x, V::broadcast(0x1.ec0378p-3F));
    sum = fma(sum, x, V::broadcast(0x1.62e12cp-1F));
    return fma(sum, x, V::broadcast(1));
  } else {
    V sum = fma(V::broadcast(0x1.41fbbcp-13F), x, V::broadcast(0x1.5f3e54p-10F));
    sum = fma(sum, x, V::broadcast(0x1.3b2d4cp-7F));
    sum = fma(sum, x, V::broadcast(0x1.c6aee8p-5F));
    sum = fma(sum, x, V::broadcast(0x1.ebfbdcp-3F));
    sum = fma(sum, x, V::broadcast(0x1.62e43p-1F));
    return fma(sum, x, V::broadcast(1));
  }
}

// 2^x for x <= 0, within 2.1 units in the last place (for BFloat16 as exp2_polynomial is) while the result is at least
// 2^-126. Below that it may be 0, at -Inf it is, and NaN stays NaN.
template <class T = float>
RESNORM_INLINE Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  const V fraction = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp2_polynomial<T>(fraction).v, (x - fraction).v)};
#else
  // In a sum with this number the unit in the last place is 1: the sum is rounded to a whole number, and its low bits
  // are the exponent field of 2 to the power of that number.
  const V rounding = V::broadcast(0x1.8p23F + 127);
  typedef std::uint32_t Bits __attribute__((vector_size(sizeof(V))));
  x = max(V::broadcast(-127), x);
  const V rounded = x + rounding;
  const V power = {__builtin_bit_cast(decltype(V::v), __builtin_bit_cast(Bits, rounded.v) << 23)};
  return exp2_polynomial<T>(x - (rounded - rounding)) * power;
#endif
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
