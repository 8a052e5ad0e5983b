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

template <class Types>
constexpr int kForwardVector = kVectorBytes / sizeof(typename Types::Branch);

template <class Types, int kLanes, int kItems, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel warp_row_kernel(const Plan& plan) {
  constexpr int kVector = kForwardVector<Types>;
  constexpr auto aligned =
      norm_forward<Types, kVector, kLanes, kItems, false, false, kCentered, kAdds, kDrops, kWarpRowThreads>;
  constexpr auto shifted =
      norm_forward<Types, kVector, kLanes, kItems, false, true, kCentered, kAdds, kDrops, kWarpRowThreads>;
  return plan.shifted ? kernel_of<shifted, NormForwardArguments>() : kernel_of<aligned, NormForwardArguments>();
}

template <class Types, int kItems, bool kCluster, bool kShifted, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel block_row_kernel() {
  return kernel_of<norm_forward<Types, kForwardVector<Types>, 0, kItems, kCluster, kShifted, kCentered, kAdds, kDrops,
                                max_block_row_threads(kItems)>,
                   NormForwardArguments>();
}

template <class Types, bool kCluster, bool kShifted, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel block_row_kernel(const Plan& plan) {
  constexpr auto items_on = [](int architecture) {
    return block_row_items(sizeof(typename Types::Branch), kForwardResidualBytes<Types, kAdds>, kShifted, architecture);
  };
  if constexpr (items_on(90) == 4) {
    if (plan.items == 4) return block_row_kernel<Types, 4, kCluster, kShifted, kCentered, kAdds, kDrops>();
  }
  if constexpr (items_on(90) == 2 || items_on(100) == 2) {
    if (plan.items == 2) return block_row_kernel<Types, 2, kCluster, kShifted, kCentered, kAdds, kDrops>();
  }
  return {};
}

template <class Types, bool kCluster, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel block_row_kernel(const Plan& plan) {
  return plan.shifted ? block_row_kernel<Types, kCluster, true, kCentered, kAdds, kDrops>(plan)
                      : block_row_kernel<Types, kCluster, false, kCentered, kAdds, kDrops>(plan);
}

template <class Types, bool kCentered, bool kAdds, bool kDrops>
NormForwardKernel norm_forward_kernel(const Plan& plan) {
  if (plan.cluster > 1) return block_row_kernel<Types, true, kCentered, kAdds, kDrops>(plan);
  if (plan.row_threads == plan.threads) return block_row_kernel<Types, false, kCentered, kAdds, kDrops>(plan);
  constexpr int kMaxItems = max_warp_items(sizeof(typename Types::Branch), kForwardResidualBytes<Types, kAdds>, kDrops);
  const auto is = [&](int row_threads, int items) { return plan.row_threads == row_threads && plan.items == items; };
  if (is(8, 1)) return warp_row_kernel<Types, 8, 1, kCentered, kAdds, kDrops>(plan);
  if (is(8, 2)) return warp_row_kernel<Types, 8, 2, kCentered, kAdds, kDrops>(plan);
  if constexpr (kMaxItems < 4) {
    if (is(16, 2)) return warp_row_kernel<Types, 16, 2, kCentered, kAdds, kDrops>(plan);
    if (is(32, 2)) return warp_row_kernel<Types, 32, 2, kCentered, kAdds, kDrops>(plan);
  } else {
    if (is(8, 4)) return warp_row_kernel<Types, 8, 4, kCentered, kAdds, kDrops>(plan);
    if (is(16, 4)) return warp_row_kernel<Types, 16, 4, kCentered, kAdds, kDrops>(plan);
    if (is(32, 4)) return warp_row_kernel<Types, 32, 4, kCentered, kAdds, kDrops>(plan);
  }
  if constexpr (kMaxItems >= 3) {
    if (is(32, 3)) return warp_row_kernel<Types, 32, 3, kCentered, kAdds, kDrops>(plan);
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
