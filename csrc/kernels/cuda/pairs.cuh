// SPDX-License-Identifier: BSD-3-Clause
// Arithmetic of two float32 at once, which is one instruction on sm_100 and sm_103; sm_120 has none of these.
#pragma once

#include "primitives.cuh"

namespace resnorm::cuda {

struct Pair {
  float lower, upper;
};

RESNORM_DEVICE Pair both(float value) { return {value, value}; }
RESNORM_DEVICE float sum_of(const Pair& pair) { return pair.lower + pair.upper; }

// Elements k and k + 1.
template <int kCount>
RESNORM_DEVICE Pair pair_at(const float (&values)[kCount], int k) {
  return {values[k], values[k + 1]};
}
template <int kCount>
RESNORM_DEVICE void put_pair(float (&values)[kCount], int k, const Pair& pair) {
  values[k] = pair.lower;
  values[k + 1] = pair.upper;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
inline constexpr bool kHasPairs = true;
RESNORM_DEVICE Pair operator+(const Pair& a, const Pair& b) {
  Pair sum;
  asm("{\n"
      ".reg .b64 a, b, sum;\n"
      "mov.b64 a, {%2, %3};\n"
      "mov.b64 b, {%4, %5};\n"
      "add.rn.f32x2 sum, a, b;\n"
      "mov.b64 {%0, %1}, sum;\n"
      "}"
      : "=f"(sum.lower), "=f"(sum.upper)
      : "f"(a.lower), "f"(a.upper), "f"(b.lower), "f"(b.upper));
  return sum;
}
RESNORM_DEVICE Pair operator*(const Pair& a, const Pair& b) {
  Pair product;
  asm("{\n"
      ".reg .b64 a, b, product;\n"
      "mov.b64 a, {%2, %3};\n"
      "mov.b64 b, {%4, %5};\n"
      "mul.rn.f32x2 product, a, b;\n"
      "mov.b64 {%0, %1}, product;\n"
      "}"
      : "=f"(product.lower), "=f"(product.upper)
      : "f"(a.lower), "f"(a.upper), "f"(b.lower), "f"(b.upper));
  return product;
}
// a * b + c
RESNORM_DEVICE Pair multiply_add(const Pair& a, const Pair& b, const Pair& c) {
  Pair result;
  asm("{\n"
      ".reg .b64 a, b, c, result;\n"
      "mov.b64 a, {%2, %3};\n"
      "mov.b64 b, {%4, %5};\n"
      "mov.b64 c, {%6, %7};\n"
      "fma.rn.f32x2 result, a, b, c;\n"
      "mov.b64 {%0, %1}, result;\n"
      "}"
      : "=f"(result.lower), "=f"(result.upper)
      : "f"(a.lower), "f"(a.upper), "f"(b.lower), "f"(b.upper), "f"(c.lower), "f"(c.upper));
  return result;
}
#else
inline constexpr bool kHasPairs = false;
RESNORM_DEVICE Pair operator+(const Pair& a, const Pair& b) { return {a.lower + b.lower, a.upper + b.upper}; }
RESNORM_DEVICE Pair operator*(const Pair& a, const Pair& b) { return {a.lower * b.lower, a.upper * b.upper}; }
// a * b + c
RESNORM_DEVICE Pair multiply_add(const Pair& a, const Pair& b, const Pair& c) {
  return {a.lower * b.lower + c.lower, a.upper * b.upper + c.upper};
}
#endif

// A sum of what pairs hold, in one chain of additions: in two where that saves instructions, and takes another
// register.
class PairSum {
 public:
  RESNORM_DEVICE void add(const Pair& pair) {
    if constexpr (kHasPairs) {
      sums_ = sums_ + pair;
    } else {
      sums_.lower = sums_.lower + pair.lower + pair.upper;
    }
  }
  RESNORM_DEVICE void add_product(const Pair& a, const Pair& b) {
    if constexpr (kHasPairs) {
      sums_ = multiply_add(a, b, sums_);
    } else {
      sums_.lower = a.lower * b.lower + sums_.lower;
      sums_.lower = a.upper * b.upper + sums_.lower;
    }
  }
  RESNORM_DEVICE float total() const { return kHasPairs ? sum_of(sums_) : sums_.lower; }

 private:
  Pair sums_ = {0.0F, 0.0F};
};

// Of an even number of values. A tree: a shorter chain of dependent additions than a loop, and a smaller error.
template <int kCount>
RESNORM_DEVICE float sum_of(const float (&values)[kCount]) {
  Pair pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) pairs[i] = pair_at(values, 2 * i);
#pragma unroll
  for (int distance = 1; distance < kCount / 2; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount / 2; i += 2 * distance) pairs[i] = pairs[i] + pairs[i + distance];
  }
  return sum_of(pairs[0]);
}

template <int kCount>
RESNORM_DEVICE float sum_of_squares(const float (&values)[kCount]) {
  float squares[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i += 2) put_pair(squares, i, pair_at(values, i) * pair_at(values, i));
  return sum_of(squares);
}

}  // namespace resnorm::cuda
