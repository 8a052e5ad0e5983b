// SPDX-License-Identifier: BSD-3-Clause
// From a plan to the kernel that was compiled for it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "norm_forward.cuh"
#include "plan.h"

namespace resnorm::cuda {

template <class Types, int kLanes, int kItems, bool kCluster, bool kAdds, bool kDrops>
cudaError_t launch_norm_forward_as(const NormForwardArguments& a, const ForwardPlan& plan, cudaStream_t stream) {
  constexpr int kVector = kVectorBytes / sizeof(typename Types::Input),
                kMaxThreads = kLanes > 0 ? kWarpRowThreads : kBlockRowThreads;
  using Group = RowGroup<kLanes, kCluster>;
  const std::int64_t rows_per_block = kLanes > 0 ? plan.threads / kLanes : 1;
  const LaunchShape shape = {static_cast<int>((a.rows + rows_per_block - 1) / rows_per_block) * plan.cluster,
                             plan.cluster, plan.threads,
                             static_cast<int>(Group::slot_size(plan.threads, plan.cluster, 1 + 2) * sizeof(float))};
  constexpr auto kernel = norm_forward<Types, kVector, kLanes, kItems, kCluster, false, kAdds, kDrops, kMaxThreads>;
  constexpr auto shifted_kernel =
      norm_forward<Types, kVector, kLanes, kItems, kCluster, true, kAdds, kDrops, kMaxThreads>;
  return plan.shifted ? launch<shifted_kernel>(shape, stream, a) : launch<kernel>(shape, stream, a);
}

template <class Types, bool kAdds, bool kDrops>
cudaError_t launch_norm_forward_as(const NormForwardArguments& a, const ForwardPlan& plan, cudaStream_t stream) {
  if (plan.cluster > 1) return launch_norm_forward_as<Types, 0, kBlockRowItems, true, kAdds, kDrops>(a, plan, stream);
  if (plan.lanes == 0) return launch_norm_forward_as<Types, 0, kBlockRowItems, false, kAdds, kDrops>(a, plan, stream);
  if (plan.lanes == 8) return launch_norm_forward_as<Types, 8, 1, false, kAdds, kDrops>(a, plan, stream);
  constexpr int kStreamBytes = std::max(sizeof(typename Types::Residual), sizeof(typename Types::Sum));
  constexpr int kMaxItems = max_warp_items(sizeof(typename Types::Input), kAdds ? kStreamBytes : 0, kDrops);
  if (plan.items == 1) return launch_norm_forward_as<Types, 32, 1, false, kAdds, kDrops>(a, plan, stream);
  if (plan.items == 2) return launch_norm_forward_as<Types, 32, 2, false, kAdds, kDrops>(a, plan, stream);
  if constexpr (kMaxItems >= 3) {
    if (plan.items == 3) return launch_norm_forward_as<Types, 32, 3, false, kAdds, kDrops>(a, plan, stream);
  }
  if constexpr (kMaxItems >= 4) {
    if (plan.items == 4) return launch_norm_forward_as<Types, 32, 4, false, kAdds, kDrops>(a, plan, stream);
  }
  return cudaErrorInvalidConfiguration;  // a plan that forward_plan does not make
}

// One file compiles it for each of the types, so that compilers can share the work.
template <class Types>
cudaError_t launch_norm_forward(const NormForwardArguments& a, const ForwardPlan& plan, cudaStream_t stream) {
  using Input = typename Types::Input;
  if constexpr (std::is_same_v<Types, NormTypes<Input, Input, Input>>) {
    if (a.residual == nullptr) return launch_norm_forward_as<Types, false, false>(a, plan, stream);
  }
  return a.threshold > 0 ? launch_norm_forward_as<Types, true, true>(a, plan, stream)
                         : launch_norm_forward_as<Types, true, false>(a, plan, stream);
}

// A half-precision stream, a float32 stream, and one that becomes float32 here.
template <class Half>
using SameTypes = NormTypes<Half, Half, Half>;
template <class Half>
using Float32StreamTypes = NormTypes<Half, float, float>;
template <class Half>
using WideningTypes = NormTypes<Half, Half, float>;

#define RESNORM_NORM_FORWARD_TYPES(prefix, Types) \
  prefix template cudaError_t launch_norm_forward<Types>(const NormForwardArguments&, const ForwardPlan&, cudaStream_t)

}  // namespace resnorm::cuda
