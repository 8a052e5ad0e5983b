// SPDX-License-Identifier: BSD-3-Clause
// AVX-512 F, BW, VL and DQ: 16 float or 8 double lanes; with BF16 where the unit's flags have it. Included by simd.h.
#pragma once

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace resnorm::cpu::RESNORM_ISA {
namespace {

inline constexpr bool kHasHalfLoops = true;

RESNORM_INLINE __mmask16 mask(FirstLanes lanes) { return static_cast<__mmask16>((1U << lanes.count) - 1U); }

// Sixteen 16-bit elements.
RESNORM_INLINE __m256i load16(const void* from, AllLanes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

RESNORM_INLINE __m256i load16(const void* from, FirstLanes lanes) {
  return _mm256_maskz_loadu_epi16(mask(lanes), from);
}

RESNORM_INLINE void store16(void* to, __m256i value, AllLanes) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}

RESNORM_INLINE void store16(void* to, __m256i value, FirstLanes lanes) {
  _mm256_mask_storeu_epi16(to, mask(lanes), value);
}

RESNORM_INLINE void store16_non_temporal(void* to, __m256i value) {
  _mm256_stream_si256(static_cast<__m256i*>(to), value);
}

RESNORM_INLINE void non_temporal_fence() { _mm_sfence(); }

RESNORM_INLINE __m256i round_to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quieted = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quieted, 16));
}

// One or two at once, because the CPU's own instruction takes subnormal numbers for 0: one test for both.
template <int kCount>
RESNORM_INLINE void to_bfloat16(const __m512 (&values)[kCount], __m256i (&halves)[kCount]) {
  static_assert(kCount <= 2);
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;
  const __mmask16 first = _mm512_fpclass_ps_mask(values[0], kSubnormal);
  const __mmask16 last = _mm512_fpclass_ps_mask(values[kCount - 1], kSubnormal);
  if (_kortestz_mask16_u8(first, last)) [[likely]] {
    for (int k = 0; k < kCount; ++k) halves[k] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values[k]));
    return;
  }
#endif
  for (int k = 0; k < kCount; ++k) halves[k] = round_to_bfloat16(values[k]);
}

RESNORM_INLINE __m256i to_bfloat16(__m512 value) {
  __m256i halves[1];
  to_bfloat16<1>({value}, halves);
  return halves[0];
}

RESNORM_INLINE __m256i to_float16(__m512 value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <>
struct Vec<float> {
  static constexpr int kSize = 16;
  __m512 v;

  static RESNORM_INLINE Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }

  static RESNORM_INLINE Vec load(const float* from, AllLanes) { return {_mm512_loadu_ps(from)}; }
  static RESNORM_INLINE Vec load(const float* from, FirstLanes lanes) {
    return {_mm512_maskz_loadu_ps(mask(lanes), from)};
  }
  template <class Lanes>
  static RESNORM_INLINE Vec load(const BFloat16* from, Lanes lanes) {
    // Each element into the upper half of its lane, in one instruction.
    const __m512i upper =
        _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    constexpr __mmask32 kUpper = 0xAAAAAAAA;
    const __m512i elements = _mm512_castsi256_si512(load16(from, lanes));
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, upper, elements))};
  }
  template <class Lanes>
  static RESNORM_INLINE Vec load(const Float16* from, Lanes lanes) {
    return {_mm512_cvtph_ps(load16(from, lanes))};
  }
  static RESNORM_INLINE Vec load(const double* from, AllLanes) { return load(from, FirstLanes{kSize}); }
  static RESNORM_INLINE Vec load(const double* from, FirstLanes lanes) {
    Vec result = broadcast(0);
    load_each(from, lanes.count, result.v);
    return result;
  }

  RESNORM_INLINE void store(float* to, AllLanes) const { _mm512_storeu_ps(to, v); }
  RESNORM_INLINE void store(float* to, FirstLanes lanes) const { _mm512_mask_storeu_ps(to, mask(lanes), v); }
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

  RESNORM_INLINE void store_non_temporal(float* to) const { _mm512_stream_ps(to, v); }
  RESNORM_INLINE void store_non_temporal(BFloat16* to) const { store16_non_temporal(to, to_bfloat16(v)); }
  RESNORM_INLINE void store_non_temporal(Float16* to) const { store16_non_temporal(to, to_float16(v)); }

  template <bool kNonTemporal, int kRows, class Lanes>
  static RESNORM_INLINE void put_rows(const Vec (&values)[kRows], BFloat16* const (&to)[kRows], std::int64_t i,
                                      Lanes lanes) {
    __m512 registers[kRows];
    for (int k = 0; k < kRows; ++k) registers[k] = values[k].v;
    __m256i halves[kRows];
    to_bfloat16(registers, halves);
    for (int k = 0; k < kRows; ++k) {
      if constexpr (kNonTemporal && kSame<Lanes, AllLanes>) {
        store16_non_temporal(to[k] + i, halves[k]);
      } else {
        store16(to[k] + i, halves[k], lanes);
      }
    }
  }

  RESNORM_INLINE float first() const { return _mm512_cvtss_f32(v); }
  RESNORM_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  RESNORM_INLINE float largest() const { return _mm512_reduce_max_ps(v); }

  // Zero in the lanes that `lanes` leaves out.
  RESNORM_INLINE Vec only(AllLanes) const { return *this; }
  RESNORM_INLINE Vec only(FirstLanes lanes) const { return {_mm512_maskz_mov_ps(mask(lanes), v)}; }

  // `other` in the lanes that `lanes` leaves out.
  RESNORM_INLINE Vec first_or(FirstLanes lanes, Vec other) const {
    return {_mm512_mask_mov_ps(other.v, mask(lanes), v)};
  }

  // Zero where the 16-bit draw is below the threshold.
  RESNORM_INLINE Vec keep(const std::uint16_t* draws, std::uint32_t threshold) const {
    const __mmask16 kept = _mm512_cmpge_epu32_mask(_mm512_cvtepu16_epi32(load16(draws, AllLanes{})),
                                                   _mm512_set1_epi32(static_cast<int>(threshold)));
    return {_mm512_maskz_mov_ps(kept, v)};
  }

  friend RESNORM_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // b where either is NaN.
  friend RESNORM_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend RESNORM_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  // a where x <= 0; b where it is above, or NaN.
  friend RESNORM_INLINE Vec select_not_positive(Vec x, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LE_OQ), a.v)};
  }
};

template <>
struct Vec<double> {
  static constexpr int kSize = 8;
  __m512d v;

  static RESNORM_INLINE Vec broadcast(double value) { return {_mm512_set1_pd(value)}; }

  static RESNORM_INLINE Vec load(const double* from, AllLanes) { return {_mm512_loadu_pd(from)}; }
  static RESNORM_INLINE Vec load(const double* from, FirstLanes lanes) {
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask(lanes)), from)};
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

  RESNORM_INLINE void store(double* to, AllLanes) const { _mm512_storeu_pd(to, v); }
  RESNORM_INLINE void store(double* to, FirstLanes lanes) const {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask(lanes)), v);
  }
  template <class T>
  RESNORM_INLINE void store(T* to, AllLanes) const {
    store(to, FirstLanes{kSize});
  }
  template <class T>
  RESNORM_INLINE void store(T* to, FirstLanes lanes) const {
    store_each(v, lanes.count, to);
  }

  RESNORM_INLINE void store_non_temporal(double* to) const { _mm512_stream_pd(to, v); }

  RESNORM_INLINE double first() const { return _mm512_cvtsd_f64(v); }
  RESNORM_INLINE double sum() const { return _mm512_reduce_add_pd(v); }

  RESNORM_INLINE Vec only(AllLanes) const { return *this; }
  RESNORM_INLINE Vec only(FirstLanes lanes) const {
    return {_mm512_maskz_mov_pd(static_cast<__mmask8>(mask(lanes)), v)};
  }

  RESNORM_INLINE Vec keep(const std::uint16_t* draws, std::uint32_t threshold) const {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(draws));
    const __mmask8 kept = _mm512_cmpge_epu64_mask(_mm512_cvtepu16_epi64(eight), _mm512_set1_epi64(threshold));
    return {_mm512_maskz_mov_pd(kept, v)};
  }

  friend RESNORM_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend RESNORM_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend RESNORM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
};

// Numbers of 32 bits, each in a lane of 64; the upper halves may hold anything.
struct UInt32Vec {
  static constexpr int kSize = 8;
  __m512i v;

  static RESNORM_INLINE UInt32Vec broadcast(std::uint64_t value) {
    return {_mm512_set1_epi64(static_cast<long long>(value))};
  }
  // The counters whose blocks store_blocks writes one after the other.
  static RESNORM_INLINE UInt32Vec counters(std::uint64_t first) {
    return {_mm512_add_epi64(broadcast(first).v, _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
  }

  RESNORM_INLINE UInt32Vec high() const { return {_mm512_srli_epi64(v, 32)}; }
  friend RESNORM_INLINE UInt32Vec multiply(UInt32Vec a, UInt32Vec b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  friend RESNORM_INLINE UInt32Vec operator^(UInt32Vec a, UInt32Vec b) { return {_mm512_xor_si512(a.v, b.v)}; }

  static RESNORM_INLINE void store_blocks(UInt32Vec c0, UInt32Vec c1, UInt32Vec c2, UInt32Vec c3,
                                          std::uint16_t* draws) {
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0.v, _mm512_slli_epi64(c1.v, 32));
    const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c2.v, _mm512_slli_epi64(c3.v, 32));
    _mm512_storeu_si512(draws, _mm512_unpacklo_epi64(low, high));
    _mm512_storeu_si512(draws + 32, _mm512_unpackhi_epi64(low, high));
  }
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
