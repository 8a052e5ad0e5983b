// SPDX-License-Identifier: BSD-3-Clause
// What runs on a CPU of any architecture: 4 float or 2 double lanes by the compiler's portable vectors, which it turns
// into SSE2, NEON or plain scalar instructions. Included by simd.h.
#pragma once

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Loops of their own for half types would not be fast here: rows of them are converted first.
inline constexpr bool kHasHalfLoops = false;

RESNORM_INLINE void non_temporal_fence() {}

template <class Acc>
struct Vec {
  static constexpr int kSize = 16 / sizeof(Acc);
  typedef Acc Register __attribute__((vector_size(16)));
  Register v;

  static RESNORM_INLINE Vec broadcast(Acc value) { return {value - Register{}}; }

  static RESNORM_INLINE Vec load(const Acc* from, AllLanes) {
    Vec result;
    __builtin_memcpy(&result.v, from, sizeof result.v);
    return result;
  }
  template <class T>
  static RESNORM_INLINE Vec load(const T* from, AllLanes) {
    return load(from, FirstLanes{kSize});
  }
  template <class T>
  static RESNORM_INLINE Vec load(const T* from, FirstLanes lanes) {
    Vec result = broadcast(0);
    load_each(from, lanes.count, result.v);
    return result;
  }

  RESNORM_INLINE void store(Acc* to, AllLanes) const { __builtin_memcpy(to, &v, sizeof v); }
  template <class T>
  RESNORM_INLINE void store(T* to, AllLanes) const {
    store(to, FirstLanes{kSize});
  }
  template <class T>
  RESNORM_INLINE void store(T* to, FirstLanes lanes) const {
    store_each(v, lanes.count, to);
  }

  template <class T>
  RESNORM_INLINE void store_non_temporal(T* to) const {
    store(to, AllLanes{});
  }

  RESNORM_INLINE Acc first() const { return v[0]; }
  RESNORM_INLINE Acc sum() const {
    if constexpr (kSize == 2) {
      return v[0] + v[1];
    } else {
      return (v[0] + v[2]) + (v[1] + v[3]);
    }
  }
  RESNORM_INLINE Acc largest() const {
    Acc result = v[0];
    for (int lane = 1; lane < kSize; ++lane) result = v[lane] > result ? v[lane] : result;
    return result;
  }

  // Zero in the lanes that `lanes` leaves out.
  RESNORM_INLINE Vec only(AllLanes) const { return *this; }
  RESNORM_INLINE Vec only(FirstLanes lanes) const {
    Vec result = *this;
    for (int lane = lanes.count; lane < kSize; ++lane) result.v[lane] = 0;
    return result;
  }

  // `other` in the lanes that `lanes` leaves out.
  RESNORM_INLINE Vec first_or(FirstLanes lanes, Vec other) const {
    for (int lane = 0; lane < lanes.count; ++lane) other.v[lane] = v[lane];
    return other;
  }

  // Zero where the 16-bit draw is below the threshold.
  RESNORM_INLINE Vec keep(const std::uint16_t* draws, std::uint32_t threshold) const {
    Vec result = *this;
    for (int lane = 0; lane < kSize; ++lane) result.v[lane] = draws[lane] >= threshold ? v[lane] : Acc(0);
    return result;
  }

  friend RESNORM_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend RESNORM_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend RESNORM_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend RESNORM_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend RESNORM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  // b where either is NaN.
  friend RESNORM_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend RESNORM_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  // a where x <= 0; b where it is above, or NaN.
  friend RESNORM_INLINE Vec select_not_positive(Vec x, Vec a, Vec b) { return {x.v <= 0 ? a.v : b.v}; }
};

// Numbers of 32 bits, each in a lane of 64; the upper halves may hold anything.
struct UInt32Vec {
  static constexpr int kSize = 1;
  std::uint64_t v;

  static RESNORM_INLINE UInt32Vec broadcast(std::uint64_t value) { return {value}; }
  // The counters whose blocks store_blocks writes one after the other.
  static RESNORM_INLINE UInt32Vec counters(std::uint64_t first) { return {first}; }

  RESNORM_INLINE UInt32Vec high() const { return {v >> 32}; }
  friend RESNORM_INLINE UInt32Vec multiply(UInt32Vec a, UInt32Vec b) {
    return {(a.v & 0xFFFFFFFFU) * (b.v & 0xFFFFFFFFU)};
  }
  friend RESNORM_INLINE UInt32Vec operator^(UInt32Vec a, UInt32Vec b) { return {a.v ^ b.v}; }

  static RESNORM_INLINE void store_blocks(UInt32Vec c0, UInt32Vec c1, UInt32Vec c2, UInt32Vec c3,
                                          std::uint16_t* draws) {
    const std::uint64_t words[4] = {c0.v, c1.v, c2.v, c3.v};
    for (int half = 0; half < 8; ++half) draws[half] = static_cast<std::uint16_t>(words[half / 2] >> (half % 2 * 16));
  }
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
