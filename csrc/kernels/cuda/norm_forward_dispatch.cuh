// SPDX-License-Identifier: BSD-3-Clause
// From a plan to the kernel that was compiled for it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "element_types.cuh"
#include "launch.cuh"
#include "norm_forward.cuh"
#include "plan.h"

namespace resnorm::cuda {

using NormForwardKernel = Kernel<NormForwardArguments>;

template <class Types, int kLanes, int kItems, bool kCluster, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel norm_forward_kernel(const Plan& plan) {
  constexpr int kVector = kVectorBytes / sizeof(typename Types::Branch),
                kMaxThreads = kLanes > 0 ? kWarpRowThreads : kBlockRowThreads;
  constexpr auto aligned =
      norm_forward<Types, kVector, kLanes, kItems, kCluster, false, kCentered, kAdds, kDrops, kMaxThreads>;
  constexpr auto shifted =
      norm_forward<Types, kVector, kLanes, kItems, kCluster, true, kCentered, kAdds, kDrops, kMaxThreads>;
  return plan.shifted ? kernel_of<shifted, NormForwardArguments>() : kernel_of<aligned, NormForwardArguments>();
}

template <class Types, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel norm_forward_kernel(const Plan& plan) {
  if (plan.cluster > 1) return norm_forward_kernel<Types, 0, kBlockRowItems, true, kCentered, kAdds, kDrops>(plan);
  if (plan.row_threads > 32) {
    return norm_forward_kernel<Types, 0, kBlockRowItems, false, kCentered, kAdds, kDrops>(plan);
  }
  constexpr int kResidualBytes = std::max(sizeof(typename Types::Residual), sizeof(typename Types::Sum));
  constexpr int kMaxItems = max_warp_items(sizeof(typename Types::Branch), kAdds ? kResidualBytes : 0, kDrops);
  const auto is = [&](int row_threads, int items) { return plan.row_threads == row_threads && plan.items == items; };
  if (is(8, 1)) return norm_forward_kernel<Types, 8, 1, false, kCentered, kAdds, kDrops>(plan);
  if (is(8, 2)) return norm_forward_kernel<Types, 8, 2, false, kCentered, kAdds, kDrops>(plan);
  if constexpr (kMaxItems < 4) {
    if (is(16, 2)) return norm_forward_kernel<Types, 16, 2, false, kCentered, kAdds, kDrops>(plan);
    if (is(32, 2)) return norm_forward_kernel<Types, 32, 2, false, kCentered, kAdds, kDrops>(plan);
  } else {
    if (is(8, 4)) return norm_forward_kernel<Types, 8, 4, false, kCentered, kAdds, kDrops>(plan);
    if (is(16, 4)) return norm_forward_kernel<Types, 16, 4, false, kCentered, kAdds, kDrops>(plan);
    if (is(32, 4)) return norm_forward_kernel<Types, 32, 4, false, kCentered, kAdds, kDrops>(plan);
  }
  if constexpr (kMaxItems >= 3) {
    if (is(32, 3)) return norm_forward_kernel<Types, 32, 3, false, kCentered, kAdds, kDrops>(plan);
  }
  return {};  // a plan that forward_plan does not make
}

// Files of their own compile it for each branch's type and norm, so that compilers can share the work.
template <bool kCentered, class Types>
NormForwardKernel norm_forward_kernel(const Plan& plan, bool adds, bool drops) {
  using Branch = typename Types::Branch;
  if constexpr (std::is_same_v<Types, SameTypes<Branch>>) {
    if (!adds) return norm_forward_kernel<Types, kCentered, false, false>(plan);
  }
  return drops ? norm_forward_kernel<Types, kCentered, true, true>(plan)
               : norm_forward_kernel<Types, kCentered, true, false>(plan);
}

#define RESNORM_NORM_FORWARD_TYPES(prefix, centered, ...) \
  prefix template NormForwardKernel norm_forward_kernel<centered, __VA_ARGS__>(const Plan&, bool, bool)

}  // namespace resnorm::cuda
