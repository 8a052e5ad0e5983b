// SPDX-License-Identifier: BSD-3-Clause
// AVX2 with FMA and F16C: 8 float or 4 double lanes. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace resnorm::cpu::RESNORM_ISA {
namespace {

inline constexpr bool kHasHalfLoops = true;

RESNORM_INLINE __m256i mask32(FirstLanes lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

RESNORM_INLINE __m256i mask64(FirstLanes lanes) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes.count), _mm256_setr_epi64x(0, 1, 2, 3));
}

// Eight 16-bit elements. AVX2 has no masked access to these.
RESNORM_INLINE __m128i load16(const void* from, AllLanes) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

RESNORM_INLINE __m128i load16(const void* from, FirstLanes lanes) {
  alignas(16) std::uint16_t elements[8] = {};
  __builtin_memcpy(elements, from, lanes.count * sizeof(std::uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(elements));
}

RESNORM_INLINE void store16(void* to, __m128i value, AllLanes) { _mm_storeu_si128(static_cast<__m128i*>(to), value); }

RESNORM_INLINE void store16(void* to, __m128i value, FirstLanes lanes) {
  alignas(16) std::uint16_t elements[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(elements), value);
  __builtin_memcpy(to, elements, lanes.count * sizeof(std::uint16_t));
}

RESNORM_INLINE void store16_non_temporal(void* to, __m128i value) {
  _mm_stream_si128(static_cast<__m128i*>(to), value);
}

RESNORM_INLINE void non_temporal_fence() { _mm_sfence(); }

RESNORM_INLINE __m128i to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quieted = _mm256_or_si256(rounded, _mm256_and_si256(nan, _mm256_set1_epi32(0x7FC00000)));
  const __m256i upper = _mm256_srli_epi32(quieted, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

RESNORM_INLINE __m128i to_float16(__m256 value) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <>
struct Vec<float> {
  static constexpr int kSize = 8;
  __m256 v;

  static RESNORM_INLINE Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }

  static RESNORM_INLINE Vec load(const float* from, AllLanes) { return {_mm256_loadu_ps(from)}; }
  static RESNORM_INLINE Vec load(const float* from, FirstLanes lanes) {
    return {_mm256_maskload_ps(from, mask32(lanes))};
  }
  template <class Lanes>
  static RESNORM_INLINE Vec load(const BFloat16* from, Lanes lanes) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from, lanes)), 16))};
  }
  template <class Lanes>
  static RESNORM_INLINE Vec load(const Float16* from, Lanes lanes) {
    return {_mm256_cvtph_ps(load16(from, lanes))};
  }
  static RESNORM_INLINE Vec load(const double* from, AllLanes) { return load(from, FirstLanes{kSize}); }
  static RESNORM_INLINE Vec load(const double* from, FirstLanes lanes) {
    Vec result = broadcast(0);
    load_each(from, lanes.count, result.v);
    return result;
  }

  RESNORM_INLINE void store(float* to, AllLanes) const { _mm256_storeu_ps(to, v); }
  RESNORM_INLINE void store(float* to, FirstLanes lanes) const { _mm256_maskstore_ps(to, mask32(lanes), v); }
  template <class Lanes>
  RESNORM_INLINE void store(BFloat16* to, Lanes lanes) const {
    store16(to, to_bfloat16(v), lanes);
  }
  template <class Lanes>
  RESNORM_INLINE void store(Float16* to, Lanes lanes) const {
    store16(to, to_float16(v), lanes);
  }
  RESNORM_INLINE void store(double* to, AllLanes) const { store(to, FirstLanes{kSize}); }
  RESNORM_INLINE void store(double* to, FirstLanes lanes) const { store_each(v, lanes.count, to); }

  RESNORM_INLINE void store_non_temporal(float* to) const { _mm256_stream_ps(to, v); }
  RESNORM_INLINE void store_non_temporal(BFloat16* to) const { store16_non_temporal(to, to_bfloat16(v)); }
  RESNORM_INLINE void store_non_temporal(Float16* to) const { store16_non_temporal(to, to_float16(v)); }

  RESNORM_INLINE float first() const { return _mm256_cvtss_f32(v); }
  RESNORM_INLINE float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  RESNORM_INLINE float largest() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  // Zero in the lanes that `lanes` leaves out.
  RESNORM_INLINE Vec only(AllLanes) const { return *this; }
  RESNORM_INLINE Vec only(FirstLanes lanes) const { return {_mm256_and_ps(v, _mm256_castsi256_ps(mask32(lanes)))}; }

  // `other` in the lanes that `lanes` leaves out.
  RESNORM_INLINE Vec first_or(FirstLanes lanes, Vec other) const {
    return {_mm256_blendv_ps(other.v, v, _mm256_castsi256_ps(mask32(lanes)))};
  }

  // Zero where the 16-bit draw is below the threshold.
  RESNORM_INLINE Vec keep(const std::uint16_t* draws, std::uint32_t threshold) const {
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(threshold)),
                                             _mm256_cvtepu16_epi32(load16(draws, AllLanes{})));
    return {_mm256_andnot_ps(_mm256_castsi256_ps(below), v)};
  }

  friend RESNORM_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // b where either is NaN.
  friend RESNORM_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  // a where x <= 0; b where it is above, or NaN.
  friend RESNORM_INLINE Vec select_not_positive(Vec x, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LE_OQ))};
  }
};

template <>
struct Vec<double> {
  static constexpr int kSize = 4;
  __m256d v;

  static RESNORM_INLINE Vec broadcast(double value) { return {_mm256_set1_pd(value)}; }

  static RESNORM_INLINE Vec load(const double* from, AllLanes) { return {_mm256_loadu_pd(from)}; }
  static RESNORM_INLINE Vec load(const double* from, FirstLanes lanes) {
    return {_mm256_maskload_pd(from, mask64(lanes))};
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

  RESNORM_INLINE void store(double* to, AllLanes) const { _mm256_storeu_pd(to, v); }
  RESNORM_INLINE void store(double* to, FirstLanes lanes) const { _mm256_maskstore_pd(to, mask64(lanes), v); }
  template <class T>
  RESNORM_INLINE void store(T* to, AllLanes) const {
    store(to, FirstLanes{kSize});
  }
  template <class T>
  RESNORM_INLINE void store(T* to, FirstLanes lanes) const {
    store_each(v, lanes.count, to);
  }

  RESNORM_INLINE void store_non_temporal(double* to) const { _mm256_stream_pd(to, v); }

  RESNORM_INLINE double first() const { return _mm256_cvtsd_f64(v); }
  RESNORM_INLINE double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }

  RESNORM_INLINE Vec only(AllLanes) const { return *this; }
  RESNORM_INLINE Vec only(FirstLanes lanes) const { return {_mm256_and_pd(v, _mm256_castsi256_pd(mask64(lanes)))}; }

  RESNORM_INLINE Vec keep(const std::uint16_t* draws, std::uint32_t threshold) const {
    const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(draws));
    const __m256i below = _mm256_cmpgt_epi64(_mm256_set1_epi64x(threshold), _mm256_cvtepu16_epi64(four));
    return {_mm256_andnot_pd(_mm256_castsi256_pd(below), v)};
  }

  friend RESNORM_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend RESNORM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
};

// Numbers of 32 bits, each in a lane of 64; the upper halves may hold anything.
struct UInt32Vec {
  static constexpr int kSize = 4;
  __m256i v;

  static RESNORM_INLINE UInt32Vec broadcast(std::uint64_t value) {
    return {_mm256_set1_epi64x(static_cast<long long>(value))};
  }
  // The counters whose blocks store_blocks writes one after the other.
  static RESNORM_INLINE UInt32Vec counters(std::uint64_t first) {
    return {_mm256_add_epi64(broadcast(first).v, _mm256_setr_epi64x(0, 2, 1, 3))};
  }

  RESNORM_INLINE UInt32Vec high() const { return {_mm256_srli_epi64(v, 32)}; }
  friend RESNORM_INLINE UInt32Vec multiply(UInt32Vec a, UInt32Vec b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  friend RESNORM_INLINE UInt32Vec operator^(UInt32Vec a, UInt32Vec b) { return {_mm256_xor_si256(a.v, b.v)}; }

  static RESNORM_INLINE void store_blocks(UInt32Vec c0, UInt32Vec c1, UInt32Vec c2, UInt32Vec c3,
                                          std::uint16_t* draws) {
    const __m256i low = _mm256_blend_epi32(c0.v, _mm256_slli_epi64(c1.v, 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(c2.v, _mm256_slli_epi64(c3.v, 32), 0xAA);
    auto* to = reinterpret_cast<__m256i*>(draws);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low, high));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low, high));
  }
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
