// SPDX-License-Identifier: BSD-3-Clause
// The activation functions of a feed-forward block and their derivatives, in float32.
//
// gelu(x) = x cdf(x) (Hendrycks and Gimpel 2016), where cdf is the normal distribution's or, in the tanh form, that of
// a logistic distribution close to it. Both are computed for -|x|, where the tail keeps its digits however small it is;
// 1 - tail is the other side. As the formula has it, gelu(-Inf) is NaN, and so are the derivatives at -Inf and Inf.
#pragma once

#include "exp2.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

struct Distribution {
  Vec<float> cdf, density;
};

// -|x|, but not so far out that powers of it overflow: no tail is left there.
RESNORM_INLINE Vec<float> bounded_negative(Vec<float> x) {
  using V = Vec<float>;
  return max(V::broadcast(-16), V::broadcast(0) - max(x, V::broadcast(0) - x));
}

// The tail is exp(-x^2 / 2) times a polynomial, fitted so that its error times exp(-x^2 / 2) max(|x|, 1), which is the
// error of gelu and of its derivative, is nowhere above 3.5e-8.
RESNORM_INLINE Distribution normal_distribution(Vec<float> x) {
  using V = Vec<float>;
  constexpr float kHalfLog2E = 0.72134752F, kReciprocalSqrt2Pi = 0.39894228F;
  constexpr float kCoefficients[] = {0x1.afe9b6p-18F, 0x1.370b60p-14F, 0x1.0de35cp-11F, 0x1.419d40p-9F,
                                     0x1.1f40ecp-7F,  0x1.9d1ee2p-6F,  0x1.f9ec42p-5F,  0x1.0fdde2p-3F,
                                     0x1.ffecccp-3F,  0x1.9883cep-2F,  0x1.000000p-1F};
  const V negative = bounded_negative(x);
  V polynomial = V::broadcast(0x1.0d81eap-22F);
  for (const float coefficient : kCoefficients) polynomial = fma(polynomial, negative, V::broadcast(coefficient));
  const V exponential = exp2(V::broadcast(-kHalfLog2E) * (x * x));
  const V tail = exponential * polynomial;
  return {select_not_positive(x, tail, V::broadcast(1) - tail), V::broadcast(kReciprocalSqrt2Pi) * exponential};
}

// cdf(x) = (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3).
RESNORM_INLINE Distribution tanh_distribution(Vec<float> x) {
  using V = Vec<float>;
  constexpr double kLog2E = 1.4426950408889634, kSqrt2OverPi = 0.7978845608028654;
  constexpr auto kReciprocalLog2E = static_cast<float>(1 / kLog2E);
  constexpr auto kLinear = static_cast<float>(2 * kSqrt2OverPi * kLog2E);
  constexpr auto kCubic = static_cast<float>(2 * kSqrt2OverPi * kLog2E * 0.044715);
  const V negative = bounded_negative(x), square = negative * negative;
  const V exponential = exp2(negative * fma(V::broadcast(kCubic), square, V::broadcast(kLinear)));
  const V reciprocal = V::broadcast(1) / (V::broadcast(1) + exponential);
  const V slope = V::broadcast(kReciprocalLog2E) * fma(V::broadcast(3 * kCubic), square, V::broadcast(kLinear));
  return {select_not_positive(x, exponential, V::broadcast(1)) * reciprocal,
          slope * (exponential * reciprocal) * reciprocal};
}

template <Distribution (*kDistribution)(Vec<float>)>
struct GeluBy {
  static RESNORM_INLINE Vec<float> value(Vec<float> x) { return x * kDistribution(x).cdf; }
  static RESNORM_INLINE Vec<float> derivative(Vec<float> x) {
    const auto [cdf, density] = kDistribution(x);
    return fma(x, density, cdf);
  }
};

// NaN stays NaN, and its derivative is 1, as torch has it.
struct Relu {
  static RESNORM_INLINE Vec<float> value(Vec<float> x) { return max(Vec<float>::broadcast(0), x); }
  static RESNORM_INLINE Vec<float> derivative(Vec<float> x) {
    return select_not_positive(x, Vec<float>::broadcast(0), Vec<float>::broadcast(1));
  }
};

// Calls f with the Tag of an activation.
template <class F>
inline void visit(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:  // which no kernel is called for
      return;
    case Activation::kRelu:
      return f(Tag<Relu>{});
    case Activation::kGelu:
      return f(Tag<GeluBy<normal_distribution>>{});
    case Activation::kGeluTanh:
      return f(Tag<GeluBy<tanh_distribution>>{});
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
