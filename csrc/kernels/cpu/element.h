// SPDX-License-Identifier: BSD-3-Clause
// The element types of a matrix, converted one at a time. simd.h converts vectors of them.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <class T>
inline constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<Float16> = DType::kFloat16;

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

template <bool kDouble>
struct AccumulationType {
  using Type = float;
};
template <>
struct AccumulationType<true> {
  using Type = double;
};

// What the statistics and sums of a computation on these element types are kept in.
template <class... T>
using Accumulation = typename AccumulationType<(kSame<T, double> || ...)>::Type;

template <class T>
struct Tag {
  using Type = T;
};

// Calls f with the Tag of a runtime dtype.
template <class F>
inline void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Tag<float>{});
    case DType::kFloat64:
      return f(Tag<double>{});
    case DType::kBFloat16:
      return f(Tag<BFloat16>{});
    case DType::kFloat16:
      return f(Tag<Float16>{});
  }
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(value.bits) << 16);
}

inline float to_float(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000U) << 16;
  std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7FFFU) << 13;
  if (magnitude >= 0x0F800000U) {  // Inf or NaN: the exponent's other bits are ones too
    magnitude |= 0x7F800000U;
  } else {  // the exponents' biases differ by 112; the product is exact, for subnormal numbers too
    magnitude = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112F);
  }
  return __builtin_bit_cast(float, sign | magnitude);
}

inline void convert(float from, float& to) { to = from; }

inline void convert(float from, BFloat16& to) {
  const auto bits = __builtin_bit_cast(std::uint32_t, from);
  const std::uint32_t rounded = bits + 0x7FFFU + ((bits >> 16) & 1U);  // to nearest, ties to even
  to.bits = static_cast<std::uint16_t>(from != from ? (bits >> 16) | 0x40U : rounded >> 16);
}

inline void convert(float from, Float16& to) {
  const auto bits = __builtin_bit_cast(std::uint32_t, from);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t half;
  if (magnitude > 0x7F800000U) {
    half = 0x7E00U | ((magnitude >> 13) & 0x3FFU);
  } else if (magnitude >= 0x47800000U) {  // 65536 and above
    half = 0x7C00U;
  } else if (magnitude >= 0x38800000U) {  // normal in half precision: round, and let a carry reach the exponent
    half = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  } else {  // subnormal: beside 0.5 the float32 unit in the last place is half precision's
    half = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5F) -
           __builtin_bit_cast(std::uint32_t, 0.5F);
  }
  to.bits = static_cast<std::uint16_t>((bits >> 16 & 0x8000U) | half);
}

// Through float32 where one side is a half type, as torch converts.
template <class T>
inline double to_double(T value) {
  return static_cast<double>(to_float(value));
}
inline double to_double(double value) { return value; }
inline float to_float(double value) { return static_cast<float>(value); }

template <class T>
inline void convert(double from, T& to) {
  convert(static_cast<float>(from), to);
}
inline void convert(double from, double& to) { to = from; }
inline void convert(float from, double& to) { to = static_cast<double>(from); }

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
