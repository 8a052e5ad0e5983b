// SPDX-License-Identifier: BSD-3-Clause
// From a plan to the kernel that was compiled for it.
#pragma once

#include <type_traits>

#include "element_types.cuh"
#include "launch.cuh"
#include "norm_backward.cuh"
#include "plan.h"

namespace resnorm::cuda {

using NormBackwardKernel = Kernel<NormBackwardArguments>;

// What a backward pass has, beside its plan. Without `adds` a row has one gradient, grad_input.
struct NormBackwardOptions {
  bool adds, drops, input_bias;
};

template <class Types, bool kWarpRow, int kItems, bool kCluster, bool kCentered, bool kAdds, bool kDrops,
          bool kInputBias>
NormBackwardKernel norm_backward_kernel(const Plan& plan) {
  constexpr int kVector = kVectorBytes / sizeof(typename Types::Branch);
  constexpr auto aligned =
      norm_backward<Types, kVector, kWarpRow, kItems, kCluster, false, kCentered, kAdds, kDrops, kInputBias>;
  if constexpr (kItems * kVector == kBackwardElements) {
    constexpr auto shifted =
        norm_backward<Types, kVector, kWarpRow, kItems, kCluster, true, kCentered, kAdds, kDrops, kInputBias>;
    if (plan.shifted) return kernel_of<shifted, NormBackwardArguments>();
  }
  return kernel_of<aligned, NormBackwardArguments>();
}

template <class Types, bool kCentered, bool kAdds, bool kDrops, bool kInputBias>
NormBackwardKernel norm_backward_kernel(const Plan& plan) {
  constexpr int kItems = kBackwardElements / (kVectorBytes / sizeof(typename Types::Branch));
  if (plan.cluster > 1) {
    return norm_backward_kernel<Types, false, kItems, true, kCentered, kAdds, kDrops, kInputBias>(plan);
  }
  if (plan.row_threads > 32) {
    return norm_backward_kernel<Types, false, kItems, false, kCentered, kAdds, kDrops, kInputBias>(plan);
  }
  if (plan.items == kItems) {
    return norm_backward_kernel<Types, true, kItems, false, kCentered, kAdds, kDrops, kInputBias>(plan);
  }
  return norm_backward_kernel<Types, true, kItems / 2, false, kCentered, kAdds, kDrops, kInputBias>(plan);
}

// Files of their own compile it for each branch's type and norm, so that compilers can share the work.
template <bool kCentered, class Types>
NormBackwardKernel norm_backward_kernel(const Plan& plan, const NormBackwardOptions& options) {
  using Branch = typename Types::Branch;
  if constexpr (std::is_same_v<Types, SameTypes<Branch>>) {
    if (!options.adds) return norm_backward_kernel<Types, kCentered, false, false, false>(plan);
  }
  if (options.drops) {
    return options.input_bias ? norm_backward_kernel<Types, kCentered, true, true, true>(plan)
                              : norm_backward_kernel<Types, kCentered, true, true, false>(plan);
  }
  return options.input_bias ? norm_backward_kernel<Types, kCentered, true, false, true>(plan)
                            : norm_backward_kernel<Types, kCentered, true, false, false>(plan);
}

#define RESNORM_NORM_BACKWARD_TYPES(prefix, centered, ...)                                    \
  prefix template NormBackwardKernel norm_backward_kernel<centered, __VA_ARGS__>(const Plan&, \
                                                                                 const NormBackwardOptions&)

}  // namespace resnorm::cuda
