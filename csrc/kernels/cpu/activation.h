// SPDX-License-Identifier: BSD-3-Clause
// The activation functions of a feed-forward block and their derivatives, in float32.
//
// gelu(x) = x cdf(x) (Hendrycks and Gimpel 2016), where cdf is the normal distribution's or, in the tanh form, that of
// a logistic distribution close to it. What is computed is the tail beyond |x|, which keeps digits however small it is;
// 1 - tail is the other side. As the formula has it, gelu(-Inf) is NaN, and so are the derivatives at -Inf and Inf.
#pragma once

#include "exp2.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

RESNORM_INLINE Vec<float> absolute(Vec<float> x) { return max(Vec<float>::broadcast(0) - x, x); }

// |x|, but not so far out that powers of it overflow: no tail is left there.
RESNORM_INLINE Vec<float> bounded_distance(Vec<float> x) {
  using V = Vec<float>;
  return min(V::broadcast(16), absolute(x));
}

// The distribution function of a symmetric distribution whose tail beyond |x| is `tail`.
RESNORM_INLINE Vec<float> cdf_of_tail(Vec<float> x, Vec<float> tail) {
  return select_not_positive(x, tail, Vec<float>::broadcast(1) - tail);
}

// The polynomial of these coefficients, the highest one first: its last four terms apart from the others, so that they
// need not wait for each other. At Inf it is -Inf where the first coefficient and the last but three are negative.
template <int kCount>
RESNORM_INLINE Vec<float> polynomial(const float (&coefficients)[kCount], Vec<float> x) {
  using V = Vec<float>;
  const auto sum_of = [&](auto first, auto count) RESNORM_INLINE_LAMBDA {
    V sum = V::broadcast(coefficients[first]);
    unrolled<count - 1>([&](auto i)
                            RESNORM_INLINE_LAMBDA { sum = fma(sum, x, V::broadcast(coefficients[first + 1 + i])); });
    return sum;
  };
  const V square = x * x;
  return fma(sum_of(Index<0>{}, Index<kCount - 4>{}), square * square, sum_of(Index<kCount - 4>{}, Index<4>{}));
}

struct ValueAndDerivative {
  Vec<float> value, derivative;
};

// The normal distribution. T is what the value will be rounded to.
struct Gelu {
  template <class T>
  static RESNORM_INLINE Vec<float> value(Vec<float> x) {
    return x * cdf_of_tail(x, tail<T>(x));
  }

  // exp(-x^2 / 2), which the density has, times a polynomial is the tail, too: fitted so that its error times
  // exp(-x^2 / 2) max(|x|, 1), which is that of the derivative, is nowhere above 3.5e-8.
  static RESNORM_INLINE ValueAndDerivative with_derivative(Vec<float> x) {
    using V = Vec<float>;
    constexpr float kHalfLog2E = 0.72134752F, kReciprocalSqrt2Pi = 0.39894228F;
    constexpr float kCoefficients[] = {-0x1.0d81eap-22F, 0x1.afe9b6p-18F, -0x1.370b60p-14F, 0x1.0de35cp-11F,
                                       -0x1.419d40p-9F,  0x1.1f40ecp-7F,  -0x1.9d1ee2p-6F,  0x1.f9ec42p-5F,
                                       -0x1.0fdde2p-3F,  0x1.ffecccp-3F,  -0x1.9883cep-2F,  0x1.000000p-1F};
    const V distance = bounded_distance(x);
    const V exponential = exp2(V::broadcast(-kHalfLog2E) * (distance * distance));
    const V cdf = cdf_of_tail(x, exponential * polynomial(kCoefficients, distance));
    return {x * cdf, fma(x, V::broadcast(kReciprocalSqrt2Pi) * exponential, cdf)};
  }

 private:
  // The tail beyond |x|. Its logarithm is fitted on [0, 6] so that the tail's error times max(|x|, 1), which is that of
  // gelu, is below 2.9e-8 and at most a fortieth of the tail; for BFloat16 below 5e-5, and 1.1e-3 of the tail up to 5.
  // Farther out, where no digit of 1 - tail is left, the polynomial falls faster than the tail.
  template <class T>
  static RESNORM_INLINE Vec<float> tail(Vec<float> x) {
    constexpr float kCoefficients[] = {-0x1.cc5ab2p-20F, 0x1.c0a8cep-16F, -0x1.11403cp-13F,
                                       -0x1.1130e0p-12F, 0x1.d85ec6p-8F,  -0x1.aec150p-5F,
                                       -0x1.d63496p-2F,  -0x1.26aef6p+0F, -1};
    constexpr float kBFloat16Coefficients[] = {-0x1.15a002p-12F, 0x1.5d7ed6p-8F,  -0x1.80382ep-5F,
                                               -0x1.dc54e8p-2F,  -0x1.26373cp+0F, -1};
    const Vec<float> distance = absolute(x);
    if constexpr (kSame<T, BFloat16>) return exp2<T>(polynomial(kBFloat16Coefficients, distance));
    return exp2<T>(polynomial(kCoefficients, distance));
  }
};

// A logistic distribution of z: cdf(x) = (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)) with
// z = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  template <class T>
  static RESNORM_INLINE Vec<float> value(Vec<float> x) {
    return x * distribution<T>(x).cdf;
  }
  static RESNORM_INLINE ValueAndDerivative with_derivative(Vec<float> x) {
    const auto [cdf, density] = distribution<float>(x);
    return {x * cdf, fma(x, density, cdf)};
  }

 private:
  struct Distribution {
    Vec<float> cdf, density;
  };

  template <class T>
  static RESNORM_INLINE Distribution distribution(Vec<float> x) {
    using V = Vec<float>;
    constexpr double kLog2E = 1.4426950408889634, kSqrt2OverPi = 0.7978845608028654;
    constexpr auto kReciprocalLog2E = static_cast<float>(1 / kLog2E);
    constexpr auto kLinear = static_cast<float>(2 * kSqrt2OverPi * kLog2E);
    constexpr auto kCubic = static_cast<float>(2 * kSqrt2OverPi * kLog2E * 0.044715);
    const V distance = bounded_distance(x), square = distance * distance;
    const V exponential = exp2<T>(distance * fma(V::broadcast(-kCubic), square, V::broadcast(-kLinear)));
    const V reciprocal = V::broadcast(1) / (V::broadcast(1) + exponential);
    const V slope = V::broadcast(kReciprocalLog2E) * fma(V::broadcast(3 * kCubic), square, V::broadcast(kLinear));
    return {select_not_positive(x, exponential, V::broadcast(1)) * reciprocal,
            slope * (exponential * reciprocal) * reciprocal};
  }
};

// NaN stays NaN, and its derivative is 1, as torch has it.
struct Relu {
  template <class T>
  static RESNORM_INLINE Vec<float> value(Vec<float> x) {
    return max(Vec<float>::broadcast(0), x);
  }
  static RESNORM_INLINE ValueAndDerivative with_derivative(Vec<float> x) {
    return {value<float>(x), select_not_positive(x, Vec<float>::broadcast(0), Vec<float>::broadcast(1))};
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
      return f(Tag<Gelu>{});
    case Activation::kGeluTanh:
      return f(Tag<GeluTanh>{});
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
