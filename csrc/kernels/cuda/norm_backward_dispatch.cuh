// SPDX-License-Identifier: BSD-3-Clause
// From a plan to the kernel that was compiled for it.
#pragma once

#include <type_traits>

#include "launch.cuh"
#include "norm_backward.cuh"

namespace resnorm::cuda {

template <class Types, bool kAdds, bool kDrops, bool kInputBias>
cudaError_t launch_norm_backward_as(const NormBackwardArguments& a, const BackwardPlan& plan, int blocks,
                                    cudaStream_t stream) {
  constexpr int kVector = kVectorBytes / sizeof(typename Types::Gradient), kItems = kBackwardElements / kVector;
  const int groups = plan.threads / plan.row_threads;
  const int slots = RowGroup<0, true>::slot_size(plan.row_threads, plan.cluster, 3);
  const LaunchShape shape = {blocks, plan.cluster, plan.threads,
                             plan.staged_bytes + groups * 2 * slots * static_cast<int>(sizeof(float))};
  if (plan.cluster > 1) {
    return launch<norm_backward<Types, kVector, false, kItems, true, kAdds, kDrops, kInputBias>>(shape, stream, a);
  }
  if (plan.row_threads > 32) {
    return launch<norm_backward<Types, kVector, false, kItems, false, kAdds, kDrops, kInputBias>>(shape, stream, a);
  }
  if (plan.items == kItems) {
    return launch<norm_backward<Types, kVector, true, kItems, false, kAdds, kDrops, kInputBias>>(shape, stream, a);
  }
  return launch<norm_backward<Types, kVector, true, kItems / 2, false, kAdds, kDrops, kInputBias>>(shape, stream, a);
}

// One file compiles it for each of the types, so that compilers can share the work. `adds` tells add_layer_norm's
// backward pass from layer_norm's.
template <class Types>
cudaError_t launch_norm_backward(const NormBackwardArguments& a, const BackwardPlan& plan, bool adds, bool input_bias,
                                 int blocks, cudaStream_t stream) {
  using Gradient = typename Types::Gradient;
  if constexpr (std::is_same_v<Types, BackwardTypes<Gradient, Gradient, Gradient>>) {
    if (!adds) return launch_norm_backward_as<Types, false, false, false>(a, plan, blocks, stream);
  }
  if (a.threshold > 0) {
    return input_bias ? launch_norm_backward_as<Types, true, true, true>(a, plan, blocks, stream)
                      : launch_norm_backward_as<Types, true, true, false>(a, plan, blocks, stream);
  }
  return input_bias ? launch_norm_backward_as<Types, true, false, true>(a, plan, blocks, stream)
                    : launch_norm_backward_as<Types, true, false, false>(a, plan, blocks, stream);
}

// Gradients as norm_forward_dispatch.cuh's streams: of one type, a float32 stream, and one that became float32.
template <class Half>
using SameGradients = BackwardTypes<Half, Half, Half>;
template <class Half>
using Float32StreamGradients = BackwardTypes<Half, float, float>;
template <class Half>
using WideningGradients = BackwardTypes<Half, Half, float>;

#define RESNORM_NORM_BACKWARD_TYPES(prefix, Types)                                                                 \
  prefix template cudaError_t launch_norm_backward<Types>(const NormBackwardArguments&, const BackwardPlan&, bool, \
                                                          bool, int, cudaStream_t)

}  // namespace resnorm::cuda
