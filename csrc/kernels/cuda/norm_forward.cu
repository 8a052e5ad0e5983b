// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <limits>

#include "alignment.h"
#include "norm_forward.h"
#include "norm_forward_dispatch.cuh"
#include "norm_forward_generic.cuh"

namespace resnorm::cuda {

#define RESNORM_COMPILED_ELSEWHERE(...)                  \
  RESNORM_NORM_FORWARD_TYPES(extern, true, __VA_ARGS__); \
  RESNORM_NORM_FORWARD_TYPES(extern, false, __VA_ARGS__)
RESNORM_FOR_ELEMENT_TYPES(RESNORM_COMPILED_ELSEWHERE);

namespace {

using KernelOfPlan = NormForwardKernel (*)(const Plan& plan, bool adds, bool drops);

// The kernels for these types; none for a rare combination.
KernelOfPlan kernels_for(const NormForward& a) {
  const bool adds = a.residual.data != nullptr;
  const DType residual = adds ? a.residual.dtype : a.input.dtype;
  const DType sum = a.sum.data == nullptr ? residual : a.sum.dtype;
  const bool is_float64 = adds && a.sum.dtype == DType::kFloat64;  // the accumulation is, stored or not
  if (a.output.dtype != a.input.dtype || is_float64) return nullptr;
  return with_element_types<KernelOfPlan>(a.input.dtype, residual, sum, [&]<class Types>() -> KernelOfPlan {
    if (a.centered) return norm_forward_kernel<true, Types>;
    return norm_forward_kernel<false, Types>;
  });
}

int vector_of(const NormForward& a) { return kVectorBytes / size_of(a.input.dtype); }

Alignment alignment_of(const NormForward& a) {
  return Alignment(a.rows, vector_of(a)).with(a.input).with(a.residual).with(a.output).with(a.sum);
}

ParameterTypes parameters_of(const NormForward& a) {
  return ParameterTypes(a.input.dtype).with(a.weight).with(a.bias).with(a.input_bias);
}

LaunchShape shape_of(const NormForward& a, const Plan& plan) {
  const bool is_block_row = plan.row_threads == plan.threads;
  const int slots = is_block_row ? slot_size_of(plan, 1) + (a.centered ? slot_size_of(plan, 2) : 0) : 0;
  const auto blocks = static_cast<int>((a.rows + plan.groups() - 1) / plan.groups()) * plan.cluster;
  const int shared_bytes = forward_barrier_bytes(plan.cluster > 1) + slots * static_cast<int>(sizeof(float));
  return {blocks, plan.cluster, plan.threads, shared_bytes, plan.overlaps};
}

NormForwardKernel kernel_for(const NormForward& a, const Plan& plan) {
  return kernels_for(a)(plan, a.residual.data != nullptr, a.dropout.threshold > 0);
}

template <class Value>
cudaError_t launch_generic(const NormForward& a, const std::int64_t* seed, cudaStream_t stream) {
  constexpr std::int64_t kMaxBlocks = 1 << 20;
  const auto blocks = static_cast<int>(std::min(a.rows, kMaxBlocks));
  const int values = 2 * RowGroup<0, false>::slot_size(kGenericThreads, 1, 2);
  const LaunchShape shape = {blocks, 1, kGenericThreads, values * static_cast<int>(sizeof(Value))};
  return launch<norm_forward_generic<Value>>(shape, stream, a, seed);
}

}  // namespace

Plan norm_forward_plan(const NormForward& a, const Device& device) {
  const Alignment alignment = alignment_of(a);
  const ParameterTypes parameters = parameters_of(a);
  if (kernels_for(a) == nullptr || !alignment.alike() || !parameters.alike() ||
      a.cols > std::numeric_limits<int>::max() / 2) {
    return {.generic = true};
  }
  const int sum_bytes = a.sum.data == nullptr ? 0 : size_of(a.sum.dtype);
  const int residual_bytes = a.residual.data == nullptr ? 0 : std::max(size_of(a.residual.dtype), sum_bytes);
  Plan plan = forward_plan(static_cast<int>(a.cols), size_of(a.input.dtype), residual_bytes, a.dropout.threshold > 0,
                           alignment.shifted(a.cols) || !parameters.aligned(), device.architecture);
  if (plan.generic) return plan;
  if (plan.cluster > 1) {
    int clusters = 0;
    const auto count = kernel_for(a, plan).count_resident_clusters;
    if (count(shape_of(a, plan), device, clusters) != cudaSuccess || clusters == 0) return {.generic = true};
  }
  // A launch of one wave: longer ones would gain nothing.
  const std::int64_t at_once = std::int64_t{device.multiprocessors} * kThreadsAtOnce / plan.threads;
  plan.overlaps = has_overlapping_kernels(device.architecture) && shape_of(a, plan).blocks <= at_once;
  return plan;
}

cudaError_t norm_forward(const NormForward& a, const Plan& plan, const std::int64_t* seed, cudaStream_t stream) {
  if (plan.generic) {
    const bool is_float64 =
        a.input.dtype == DType::kFloat64 || (a.residual.data != nullptr && a.sum.dtype == DType::kFloat64);
    return is_float64 ? launch_generic<double>(a, seed, stream) : launch_generic<float>(a, seed, stream);
  }
  const auto kernel = kernel_for(a, plan);
  if (kernel.launch == nullptr) return cudaErrorInvalidConfiguration;
  return kernel.launch(shape_of(a, plan), stream,
                       {.input = a.input.data,
                        .residual = a.residual.data,
                        .input_bias = a.input_bias.data,
                        .weight = a.weight.data,
                        .bias = a.bias.data,
                        .output = a.output.data,
                        .sum = a.sum.data,
                        .mean = static_cast<float*>(a.mean),
                        .rstd = static_cast<float*>(a.rstd),
                        .seed = seed,
                        .rows = a.rows,
                        .input_stride = a.input.row_stride,
                        .residual_stride = a.residual.row_stride,
                        .output_stride = a.output.row_stride,
                        .sum_stride = a.sum.row_stride,
                        .cols = static_cast<int>(a.cols),
                        .float32_parameters = parameters_of(a).float32(),
                        .first_element = alignment_of(a).first_element(),
                        .reciprocal_cols = static_cast<float>(1.0 / static_cast<double>(a.cols)),
                        .eps = static_cast<float>(a.eps),
                        .threshold = a.dropout.threshold,
                        .scale = a.dropout.scale});
}

}  // namespace resnorm::cuda
