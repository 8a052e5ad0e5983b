// SPDX-License-Identifier: BSD-3-Clause
// One thin vector type for every instruction set: Vec<float> and Vec<double>, the accumulation types, loaded from and
// stored to any element type (rounded to nearest even, NaN kept). Every header of the kernels is written on it once and
// compiled once per instruction set, all of it with internal linkage: a function compiled for AVX-512 must never be the
// copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

#define RESNORM_INLINE inline __attribute__((always_inline))
#define RESNORM_INLINE_LAMBDA __attribute__((always_inline))
// For what many loops call once a row: compiled once, where inlining would multiply the time to compile.
#define RESNORM_NOINLINE __attribute__((noinline))

#include "element.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Which lanes of a vector an operation touches: all, or the first few at the end of a row.
struct AllLanes {};

struct FirstLanes {
  int count;
};

template <class Acc>
struct Vec;

// How a vector loads and stores element types that have no fast path: double beside the narrower ones, seldom used.
template <class T, class Register>
RESNORM_INLINE void load_each(const T* from, int count, Register& lanes) {
  for (int lane = 0; lane < count; ++lane) lanes[lane] = to_double(from[lane]);
}

template <class Register, class T>
RESNORM_INLINE void store_each(const Register& lanes, int count, T* to) {
  for (int lane = 0; lane < count; ++lane) convert(lanes[lane], to[lane]);
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// An index known to the compiler, so that arrays of accumulators stay in registers.
template <int kIndex>
struct Index {
  constexpr operator int() const { return kIndex; }
};

// body(Index<0>) ... body(Index<kCount - 1>)
template <int kCount, int kIndex = 0, class Body>
RESNORM_INLINE void unrolled(const Body& body) {
  body(Index<kIndex>{});
  if constexpr (kIndex + 1 < kCount) unrolled<kCount, kIndex + 1>(body);
}

// body(Index<count>), for a count of 1 to kMax.
template <int kMax, class Body>
RESNORM_INLINE void with_count(std::int64_t count, const Body& body) {
  if constexpr (kMax > 1) {
    if (count < kMax) return with_count<kMax - 1>(count, body);
  }
  body(Index<kMax>{});
}

// Stores, past the caches where kNonTemporal: `to` is aligned then.
template <bool kNonTemporal, class V, class T, class Lanes>
RESNORM_INLINE void put(V value, T* to, Lanes lanes) {
  if constexpr (kNonTemporal && kSame<Lanes, AllLanes>) {
    value.store_non_temporal(to);
  } else {
    value.store(to, lanes);
  }
}

// One vector of each row.
template <bool kNonTemporal, class V, class T, int kRows, class Lanes>
RESNORM_INLINE void put_rows(const V (&values)[kRows], T* const (&to)[kRows], std::int64_t i, Lanes lanes) {
  if constexpr (requires { V::template put_rows<kNonTemporal>(values, to, i, lanes); }) {
    V::template put_rows<kNonTemporal>(values, to, i, lanes);
  } else {
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA { put<kNonTemporal>(values[k], to[k] + i, lanes); });
  }
}

template <class T>
RESNORM_INLINE void prefetch(const T* address) {
  __builtin_prefetch(address, 0, 3);
}

// body(Index<flag>): for a flag that a loop is compiled for.
template <class Body>
RESNORM_INLINE void with_flag(bool flag, const Body& body) {
  flag ? body(Index<1>{}) : body(Index<0>{});
}

// body(i, slot, lanes) for every vector of a row: `slot` runs over kSlots independent accumulators, which hide the
// latency of the additions.
template <class Acc, int kSlots, class Body>
RESNORM_INLINE void for_each_vector(std::int64_t cols, const Body& body) {
  constexpr int kSize = Vec<Acc>::kSize;
  std::int64_t i = 0;
  for (; i + kSlots * kSize <= cols; i += kSlots * kSize) {
    unrolled<kSlots>([&](auto slot) RESNORM_INLINE_LAMBDA { body(i + slot * kSize, slot, AllLanes{}); });
  }
  // By lanes where a whole vector is left, too: it is one, and a loop more takes longer to compile than it saves.
  for (; i < cols; i += kSize) {
    body(i, Index<0>{}, FirstLanes{static_cast<int>(cols - i < kSize ? cols - i : kSize)});
  }
}

// body(begin, size) for every piece of a long row, and once where there is nothing of it. A piece gives none of kSlots
// accumulators more than 32 vectors: one that ran through the whole row would round each element to the scale of their
// sum, and always the same way where elements are multiples of a power of two. The pieces' sums are added in double.
template <class Acc, int kSlots, class Body>
RESNORM_INLINE void for_each_piece(std::int64_t cols, const Body& body) {
  constexpr std::int64_t kPiece = 32 * kSlots * Vec<Acc>::kSize;
  std::int64_t begin = 0;
  do {
    body(begin, cols - begin < kPiece ? cols - begin : kPiece);
    begin += kPiece;
  } while (begin < cols);
}

// The sum over all slots and lanes.
template <class Acc, int kSlots>
RESNORM_INLINE Acc total(const Vec<Acc> (&slots)[kSlots]) {
  if constexpr (kSlots == 1) {
    return slots[0].sum();
  } else {
    Vec<Acc> halves[kSlots / 2];
    unrolled<kSlots / 2>([&](auto k) RESNORM_INLINE_LAMBDA { halves[k] = slots[k] + slots[k + kSlots / 2]; });
    return total(halves);
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
