// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <limits>

#include "norm_backward.h"
#include "norm_backward_any.cuh"
#include "norm_backward_dispatch.cuh"
#include "norm_backward_finish.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(extern, SameGradients<float>);
RESNORM_NORM_BACKWARD_TYPES(extern, SameGradients<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(extern, Float32StreamGradients<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(extern, WideningGradients<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(extern, SameGradients<__half>);
RESNORM_NORM_BACKWARD_TYPES(extern, Float32StreamGradients<__half>);
RESNORM_NORM_BACKWARD_TYPES(extern, WideningGradients<__half>);

namespace {

using Launch = cudaError_t (*)(const NormBackwardArguments&, const BackwardPlan&, bool, bool, int, cudaStream_t);

template <class Half>
Launch half_launch(DType half, DType residual, DType sum) {
  if (residual == half && sum == half) return launch_norm_backward<SameGradients<Half>>;
  if (residual == DType::kFloat32 && sum == DType::kFloat32) return launch_norm_backward<Float32StreamGradients<Half>>;
  if (residual == half && sum == DType::kFloat32) return launch_norm_backward<WideningGradients<Half>>;
  return nullptr;
}

// The kernels for these types; none for a rare combination.
Launch launch_for(const AddLayerNormBackward& a) {
  const DType gradient = a.grad_output.dtype, sum = a.sum.dtype;
  const DType residual = a.grad_residual.data == nullptr ? sum : a.grad_residual.dtype;
  const bool inputs_differ = a.grad_input.data != nullptr && a.grad_input.dtype != gradient;
  if (inputs_differ || (a.grad_sum.data != nullptr && a.grad_sum.dtype != sum)) return nullptr;
  switch (gradient) {
    case DType::kFloat32:
      return sum == gradient && residual == gradient ? launch_norm_backward<SameGradients<float>> : nullptr;
    case DType::kBFloat16:
      return half_launch<__nv_bfloat16>(gradient, residual, sum);
    case DType::kFloat16:
      return half_launch<__half>(gradient, residual, sum);
    default:
      return nullptr;
  }
}

bool is_aligned(const void* data, std::int64_t row_stride, std::int64_t rows, int vector) {
  if (data == nullptr) return true;
  return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0 && (rows == 1 || row_stride % vector == 0);
}

// Everything that is decided before a launch, the same whenever it is asked for.
struct Decision {
  BackwardPlan plan;
  Launch launch;
  int blocks;
  int parts;  // rows of partial sums
};

Decision decide(const AddLayerNormBackward& a, const Device& device) {
  const int bytes = size_of(a.grad_output.dtype), vector = kVectorBytes / bytes;
  const auto aligned = [&](const auto& rows) { return is_aligned(rows.data, rows.row_stride, a.rows, vector); };
  const bool alike = aligned(a.grad_output) && aligned(a.sum) && aligned(a.grad_sum) && aligned(a.grad_input) &&
                     aligned(a.grad_residual) && is_aligned(a.weight.data, 0, 1, vector) && a.cols % vector == 0 &&
                     a.cols <= std::numeric_limits<int>::max() / 2;
  const bool known_weight =
      a.weight.data == nullptr || a.weight.dtype == a.grad_output.dtype || a.weight.dtype == DType::kFloat32;
  const Launch launch = launch_for(a);
  if (launch != nullptr && alike && known_weight) {
    const int row_bytes = bytes + size_of(a.sum.dtype) * (a.grad_sum.data == nullptr ? 1 : 2);
    const BackwardPlan plan = backward_plan(static_cast<int>(a.cols), bytes, row_bytes, device.architecture);
    if (!plan.any) {
      const std::int64_t groups = plan.threads / plan.row_threads;
      const auto tiles = static_cast<int>(
          std::min<std::int64_t>((a.rows + groups - 1) / groups, std::max(1, device.multiprocessors / plan.cluster)));
      return {plan, launch, std::max(tiles, 1) * plan.cluster, std::max(tiles, 1)};
    }
  }
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>(a.rows, 1, 2 * device.multiprocessors));
  return {{.any = true}, nullptr, blocks, blocks};
}

bool is_float64(const AddLayerNormBackward& a) {
  return a.sum.dtype == DType::kFloat64 || a.grad_output.dtype == DType::kFloat64;
}

int sums_of(const AddLayerNormBackward& a) { return a.grad_input_bias.data == nullptr ? 2 : 3; }

template <class Value>
cudaError_t launch_any(const AddLayerNormBackward& a, const std::int64_t* seed, int blocks, cudaStream_t stream) {
  const int values = 2 * RowGroup<0, false>::slot_size(kAnyThreads, 1, 3);
  const LaunchShape shape = {blocks, 1, kAnyThreads, values * static_cast<int>(sizeof(Value))};
  return launch<norm_backward_any<Value>>(shape, stream, a, seed);
}

template <class Value>
cudaError_t launch_finish(const AddLayerNormBackward& a, int parts, cudaStream_t stream) {
  const FinishArguments finish = {
      a.workspace, parts, sums_of(a), a.cols, {a.grad_weight, a.grad_bias, a.grad_input_bias}};
  const auto blocks = static_cast<int>((a.cols * finish.sums + 31) / 32);
  const LaunchShape shape = {blocks, 1, kFinishThreads, kFinishThreads / 32 * 33 * static_cast<int>(sizeof(Value))};
  return launch<norm_backward_finish<Value>>(shape, stream, finish);
}

}  // namespace

std::size_t norm_backward_workspace_bytes(const AddLayerNormBackward& a, const Device& device) {
  const auto parts = static_cast<std::size_t>(decide(a, device).parts);
  return parts * static_cast<std::size_t>(sums_of(a)) * static_cast<std::size_t>(a.cols) * (is_float64(a) ? 8 : 4);
}

cudaError_t norm_backward(const AddLayerNormBackward& a, bool adds, const std::int64_t* seed, const Device& device,
                          cudaStream_t stream) {
  const Decision decision = decide(a, device);
  cudaError_t error = cudaSuccess;
  if (decision.launch == nullptr) {
    error = is_float64(a) ? launch_any<double>(a, seed, decision.blocks, stream)
                          : launch_any<float>(a, seed, decision.blocks, stream);
  } else {
    error = decision.launch({.x = a.sum.data,
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
                             .row_threads = decision.plan.row_threads,
                             .stage_bytes = decision.plan.stage_bytes,
                             .staged_bytes = decision.plan.staged_bytes,
                             .float32_parameters = a.weight.dtype != a.grad_output.dtype,
                             .reciprocal_cols = static_cast<float>(1.0 / static_cast<double>(a.cols)),
                             .threshold = a.dropout.threshold,
                             .scale = a.dropout.scale},
                            decision.plan, adds, a.grad_input_bias.data != nullptr, decision.blocks, stream);
  }
  if (error != cudaSuccess) return error;
  if (a.grad_weight.data == nullptr && a.grad_bias.data == nullptr && a.grad_input_bias.data == nullptr) return error;
  return is_float64(a) ? launch_finish<double>(a, decision.parts, stream)
                       : launch_finish<float>(a, decision.parts, stream);
}

}  // namespace resnorm::cuda
