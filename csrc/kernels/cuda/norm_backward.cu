// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <limits>

#include "alignment.h"
#include "column_sums.h"
#include "norm_backward.h"
#include "norm_backward_dispatch.cuh"
#include "norm_backward_generic.cuh"

namespace resnorm::cuda {

#define RESNORM_COMPILED_ELSEWHERE(...)                   \
  RESNORM_NORM_BACKWARD_TYPES(extern, true, __VA_ARGS__); \
  RESNORM_NORM_BACKWARD_TYPES(extern, false, __VA_ARGS__)
RESNORM_FOR_ELEMENT_TYPES(RESNORM_COMPILED_ELSEWHERE);

namespace {

using KernelOfPlan = NormBackwardKernel (*)(const Plan& plan, const NormBackwardOptions& options);

// The kernels for these types; none for a rare combination.
KernelOfPlan kernels_for(const NormBackward& a) {
  const DType gradient = a.grad_output.dtype;
  const DType residual = a.grad_residual.data == nullptr ? a.sum.dtype : a.grad_residual.dtype;
  const bool inputs_differ = a.grad_input.data != nullptr && a.grad_input.dtype != gradient;
  const bool sums_differ = a.grad_sum.data != nullptr && a.grad_sum.dtype != a.sum.dtype;
  if (inputs_differ || sums_differ) return nullptr;
  return with_element_types<KernelOfPlan>(gradient, residual, a.sum.dtype, [&]<class Types>() -> KernelOfPlan {
    if (a.centered) return norm_backward_kernel<true, Types>;
    return norm_backward_kernel<false, Types>;
  });
}

bool has_input_bias(const NormBackward& a) { return a.grad_input_bias.data != nullptr; }

NormBackwardOptions options_of(const NormBackward& a) {
  const bool drops = a.dropout.threshold > 0;
  const bool adds = a.grad_sum.data != nullptr || a.grad_residual.data != nullptr || drops || has_input_bias(a);
  return {adds, drops, has_input_bias(a)};
}

int vector_of(const NormBackward& a) { return kVectorBytes / size_of(a.grad_output.dtype); }

// Of an element of each matrix that is read, together.
int row_bytes_of(const NormBackward& a) {
  return size_of(a.grad_output.dtype) + size_of(a.sum.dtype) * (a.grad_sum.data == nullptr ? 1 : 2);
}

Alignment alignment_of(const NormBackward& a) {
  return Alignment(a.rows, vector_of(a))
      .with(a.grad_output)
      .with(a.sum)
      .with(a.grad_sum)
      .with(a.grad_input)
      .with(a.grad_residual);
}

bool is_float64(const NormBackward& a) {
  return a.sum.dtype == DType::kFloat64 || a.grad_output.dtype == DType::kFloat64;
}

LaunchShape shape_of(const NormBackward& a, const Plan& plan) {
  const int slots = plan.groups() * 2 * slot_size_of(plan, backward_row_sums(a.centered));
  return {plan.row_subsets * plan.cluster, plan.cluster, plan.threads,
          staging_of(plan, vector_of(a), row_bytes_of(a)).total_bytes + backward_barrier_bytes(plan.cluster > 1) +
              slots * static_cast<int>(sizeof(float))};
}

Plan generic_plan(const NormBackward& a, const Device& device) {
  return {.generic = true,
          .row_subsets = static_cast<int>(std::clamp<std::int64_t>(a.rows, 1, device.multiprocessors)),
          .overlaps = has_overlapping_kernels(device.architecture)};
}

template <class Value>
cudaError_t launch_generic(const NormBackward& a, int row_subsets, const std::int64_t* seed, cudaStream_t stream) {
  const int values = 2 * RowGroup<0, false>::slot_size(kGenericThreads, 1, backward_row_sums(true));
  const LaunchShape shape = {row_subsets, 1, kGenericThreads, values * static_cast<int>(sizeof(Value))};
  return launch<norm_backward_generic<Value>>(shape, stream, a, seed);
}

cudaError_t launch_planned(const NormBackward& a, const Plan& plan, const std::int64_t* seed, cudaStream_t stream) {
  const Staging staging = staging_of(plan, vector_of(a), row_bytes_of(a));
  const auto kernel = kernels_for(a)(plan, options_of(a));
  return kernel.launch(shape_of(a, plan), stream,
                       {.x = a.sum.data,
                        .grad_output = a.grad_output.data,
                        .grad_sum = a.grad_sum.data,
                        .weight = a.weight.data,
                        .mean = static_cast<const float*>(a.mean),
                        .rstd = static_cast<const float*>(a.rstd),
                        .grad_input = a.grad_input.data,
                        .grad_residual = a.grad_residual.data,
                        .partials = static_cast<float*>(a.workspace),
                        .seed = seed,
                        .rows = a.rows,
                        .x_stride = a.sum.row_stride,
                        .grad_output_stride = a.grad_output.row_stride,
                        .grad_sum_stride = a.grad_sum.row_stride,
                        .grad_input_stride = a.grad_input.row_stride,
                        .grad_residual_stride = a.grad_residual.row_stride,
                        .cols = static_cast<int>(a.cols),
                        .row_threads = plan.row_threads,
                        .stage_bytes = staging.stage_bytes,
                        .staged_bytes = staging.total_bytes,
                        .first_element = alignment_of(a).first_element(),
                        .float32_parameters = ParameterTypes(a.grad_output.dtype).with(a.weight).float32(),
                        .reciprocal_cols = static_cast<float>(1.0 / static_cast<double>(a.cols)),
                        .threshold = a.dropout.threshold,
                        .scale = a.dropout.scale});
}

}  // namespace

Plan norm_backward_plan(const NormBackward& a, const Device& device) {
  const Alignment alignment = alignment_of(a);
  const auto weight = ParameterTypes(a.grad_output.dtype).with(a.weight);
  const auto kernels = kernels_for(a);
  if (kernels == nullptr || !alignment.alike() || !weight.alike() || a.cols > std::numeric_limits<int>::max() / 2) {
    return generic_plan(a, device);
  }
  Plan plan = backward_plan(static_cast<int>(a.cols), size_of(a.grad_output.dtype), row_bytes_of(a),
                            alignment.shifted(a.cols) || !weight.aligned(), device.architecture, device.shared_bytes);
  if (plan.generic) return generic_plan(a, device);
  std::int64_t most = device.multiprocessors;
  if (plan.cluster > 1) {
    int clusters = 0;
    const auto count = kernels(plan, options_of(a)).count_resident_clusters;
    if (count(shape_of(a, plan), device, clusters) != cudaSuccess || clusters == 0) return generic_plan(a, device);
    most = clusters;
  }
  const std::int64_t wanted = (a.rows + plan.groups() - 1) / plan.groups();
  const std::int64_t apart = plan.shifted ? vector_of(a) : 1;  // subsets are a multiple of it
  const std::int64_t limit = std::max(apart, most / apart * apart);
  plan.row_subsets = static_cast<int>(std::clamp((wanted + apart - 1) / apart * apart, apart, limit));
  plan.overlaps = has_overlapping_kernels(device.architecture);
  return plan;
}

std::size_t norm_backward_workspace_bytes(const NormBackward& a, const Plan& plan) {
  const auto sums = static_cast<std::size_t>(backward_column_sums(a.centered, has_input_bias(a)));
  return static_cast<std::size_t>(plan.row_subsets) * sums * static_cast<std::size_t>(a.cols) * (is_float64(a) ? 8 : 4);
}

cudaError_t norm_backward(const NormBackward& a, const Plan& plan, const std::int64_t* seed, cudaStream_t stream) {
  const auto error = !plan.generic   ? launch_planned(a, plan, seed, stream)
                     : is_float64(a) ? launch_generic<double>(a, plan.row_subsets, seed, stream)
                                     : launch_generic<float>(a, plan.row_subsets, seed, stream);
  if (error != cudaSuccess) return error;
  const auto finish = [&](std::initializer_list<Vector> gradients) {
    return finish_column_sums(a.workspace, is_float64(a), plan, a.cols, gradients, stream);
  };
  if (a.centered) {
    return has_input_bias(a) ? finish({a.grad_weight, a.grad_bias, a.grad_input_bias})
                             : finish({a.grad_weight, a.grad_bias});
  }
  return has_input_bias(a) ? finish({a.grad_weight, a.grad_input_bias}) : finish({a.grad_weight});
}

}  // namespace resnorm::cuda
