// SPDX-License-Identifier: BSD-3-Clause
// Which element types this unit has loops for; operands of other types are converted, row by row, for one of those. An
// instruction set in which nothing but bfloat16 differs has loops for bfloat16 alone where the build has the set that
// it extends, RESNORM_BASE: that one's kernels run everything else.
#pragma once

#include "simd.h"

namespace resnorm::cpu {

RESNORM_DECLARE_KERNELS(RESNORM_ISA)
#if defined(RESNORM_BASE)
RESNORM_DECLARE_KERNELS(RESNORM_BASE)
#endif

namespace RESNORM_ISA {
namespace {

#if defined(RESNORM_BASE)
namespace base = RESNORM_BASE;
inline constexpr bool kExtends = true;
#else
namespace base = RESNORM_ISA;
inline constexpr bool kExtends = false;
#endif

template <class T>
inline constexpr bool kHasLoops = kExtends        ? kSame<T, BFloat16>
                                  : kHasHalfLoops ? true
                                                  : kSame<T, float> || kSame<T, double>;

// f(Tag) for every half type that there are loops for.
template <class F>
inline void for_each_half(const F& f) {
  if constexpr (kHasLoops<BFloat16>) f(Tag<BFloat16>{});
  if constexpr (kHasLoops<Float16>) f(Tag<Float16>{});
}

}  // namespace
}  // namespace RESNORM_ISA
}  // namespace resnorm::cpu
