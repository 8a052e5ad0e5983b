// SPDX-License-Identifier: BSD-3-Clause
// The element types as the tests see them: to and from double by arithmetic, not by the kernels' bit operations.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace resnorm::cpu::testing {

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

// Sign, exponent and mantissa widths of a 16-bit float.
struct HalfFormat {
  int exponent_bits, mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int min_exponent() const { return 1 - bias(); }

  double decode(std::uint16_t bits) const {
    const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
      return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(mantissa, min_exponent() - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  }

  // To nearest, ties to even (the rounding mode of nearbyint).
  std::uint16_t encode(double value) const {
    const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const auto infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
    if (std::isnan(value)) return static_cast<std::uint16_t>(sign | infinity | 1 << (mantissa_bits - 1));
    if (std::isinf(value)) return static_cast<std::uint16_t>(sign | infinity);
    const double magnitude = std::fabs(value);
    const int exponent = magnitude == 0 ? min_exponent() : std::max(std::ilogb(magnitude), min_exponent());
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
    // A mantissa that rounds up to the next power of two carries into the exponent field by itself.
    const int bits = units + ((exponent - min_exponent()) << mantissa_bits);
    return static_cast<std::uint16_t>(sign | std::min(bits, infinity));
  }
};

inline constexpr HalfFormat kBFloat16Format{8, 7}, kFloat16Format{5, 10};

inline const HalfFormat& format_of(DType half) { return half == DType::kBFloat16 ? kBFloat16Format : kFloat16Format; }

// Every value of a half type, by its bits.
inline const std::vector<double>& values_of(DType half) {
  static const auto decode_all = [](const HalfFormat& format) {
    std::vector<double> values;
    for (int bits = 0; bits < 65536; ++bits) values.push_back(format.decode(static_cast<std::uint16_t>(bits)));
    return values;
  };
  static const std::vector<double> bfloat16 = decode_all(kBFloat16Format), float16 = decode_all(kFloat16Format);
  return half == DType::kBFloat16 ? bfloat16 : float16;
}

inline double read(const void* data, std::int64_t index, DType dtype) {
  const auto* at = static_cast<const unsigned char*>(data) + index * size_of(dtype);
  if (dtype == DType::kFloat64) {
    double value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return values_of(dtype)[bits];
}

inline void write(void* data, std::int64_t index, DType dtype, double value) {
  auto* at = static_cast<unsigned char*>(data) + index * size_of(dtype);
  if (dtype == DType::kFloat64) {
    std::memcpy(at, &value, sizeof value);
  } else if (dtype == DType::kFloat32) {
    const auto narrow = static_cast<float>(value);
    std::memcpy(at, &narrow, sizeof narrow);
  } else {
    const auto bits = format_of(dtype).encode(value);
    std::memcpy(at, &bits, sizeof bits);
  }
}

// The largest relative error of one rounding.
inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}

// The distance between a dtype's smallest numbers, which rounding cannot beat however small the value.
inline double smallest(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 0x1p-24;
    case DType::kFloat64:
      return 0x1p-1074;
    case DType::kBFloat16:
      return 0x1p-133;
    default:
      return 0x1p-149;
  }
}

}  // namespace resnorm::cpu::testing
