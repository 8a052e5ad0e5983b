// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "norm_forward.h"
#include "norm_forward_any.cuh"
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(extern, SameTypes<float>);
RESNORM_NORM_FORWARD_TYPES(extern, SameTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(extern, Float32StreamTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(extern, WideningTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(extern, SameTypes<__half>);
RESNORM_NORM_FORWARD_TYPES(extern, Float32StreamTypes<__half>);
RESNORM_NORM_FORWARD_TYPES(extern, WideningTypes<__half>);

namespace {

using Launch = cudaError_t (*)(const NormForwardArguments&, const ForwardPlan&, cudaStream_t);

template <class Half>
Launch half_launch(DType half, DType residual, DType sum) {
  if (residual == half && sum == half) return launch_norm_forward<SameTypes<Half>>;
  if (residual == DType::kFloat32 && sum == DType::kFloat32) return launch_norm_forward<Float32StreamTypes<Half>>;
  if (residual == half && sum == DType::kFloat32) return launch_norm_forward<WideningTypes<Half>>;
  return nullptr;
}

// The kernels for these types; none for a rare combination.
Launch launch_for(const AddLayerNormForward& a) {
  const DType input = a.input.dtype;
  const DType residual = a.residual.data == nullptr ? input : a.residual.dtype;
  const DType sum = a.sum.data == nullptr ? residual : a.sum.dtype;
  const bool float64 =
      a.residual.data != nullptr && a.sum.dtype == DType::kFloat64;  // the accumulation's, if not stored
  if (a.output.dtype != input || float64) return nullptr;
  switch (input) {
    case DType::kFloat32:
      return residual == input && sum == input ? launch_norm_forward<SameTypes<float>> : nullptr;
    case DType::kBFloat16:
      return half_launch<__nv_bfloat16>(input, residual, sum);
    case DType::kFloat16:
      return half_launch<__half>(input, residual, sum);
    default:
      return nullptr;
  }
}

// How rows lie in memory: whether all of them start at the same element of a vector, and at which.
struct Alignment {
  bool same = true;
  int first_element = 0;
  bool strides_are_vectors = true;
};

Alignment alignment_of(const AddLayerNormForward& a, int vector) {
  Alignment alignment;
  bool is_first = true;
  std::int64_t stride = 0;
  const auto see = [&](const void* data, std::int64_t row_stride, DType dtype) {
    if (data == nullptr) return;
    const auto element = static_cast<int>(reinterpret_cast<std::uintptr_t>(data) / size_of(dtype) % vector);
    const std::int64_t step = a.rows > 1 ? row_stride % vector : 0;
    if (is_first) {
      alignment.first_element = element;
      stride = step;
    }
    alignment.same = alignment.same && element == alignment.first_element && step == stride;
    is_first = false;
  };
  see(a.input.data, a.input.row_stride, a.input.dtype);
  see(a.residual.data, a.residual.row_stride, a.residual.dtype);
  see(a.output.data, a.output.row_stride, a.output.dtype);
  see(a.sum.data, a.sum.row_stride, a.sum.dtype);
  alignment.strides_are_vectors = stride == 0;
  return alignment;
}

bool is_vector_aligned(const ConstVector& parameter) {
  return reinterpret_cast<std::uintptr_t>(parameter.data) % kVectorBytes == 0;
}

cudaError_t launch_any(const AddLayerNormForward& a, const std::int64_t* seed, bool float64, cudaStream_t stream) {
  constexpr std::int64_t kMaxBlocks = 1 << 20;
  const int values = 2 * RowGroup<0, false>::slot_size(kAnyThreads, 1, 2);
  const auto blocks = static_cast<int>(std::min(a.rows, kMaxBlocks));
  if (float64) {
    const LaunchShape shape = {blocks, 1, kAnyThreads, values * static_cast<int>(sizeof(double))};
    return launch<norm_forward_any<double>>(shape, stream, a, seed);
  }
  const LaunchShape shape = {blocks, 1, kAnyThreads, values * static_cast<int>(sizeof(float))};
  return launch<norm_forward_any<float>>(shape, stream, a, seed);
}

}  // namespace

cudaError_t norm_forward(const AddLayerNormForward& a, const std::int64_t* seed, const Device& device,
                         cudaStream_t stream) {
  const bool adds = a.residual.data != nullptr;
  const bool float64 = a.input.dtype == DType::kFloat64 || (adds && a.sum.dtype == DType::kFloat64);
  const Launch launch_typed = launch_for(a);
  if (launch_typed == nullptr || a.cols > std::numeric_limits<int>::max() / 2) {
    return launch_any(a, seed, float64, stream);
  }
  const int bytes = size_of(a.input.dtype), vector = kVectorBytes / bytes;
  const Alignment alignment = alignment_of(a, vector);
  bool float32_parameters = false, shifted = alignment.first_element != 0 || !alignment.strides_are_vectors;
  shifted = shifted || a.cols % vector != 0;
  bool parameters_alike = true, is_first = true;
  for (const ConstVector* parameter : {&a.weight, &a.bias, &a.input_bias}) {
    if (parameter->data == nullptr) continue;
    const bool wide = parameter->dtype != a.input.dtype;
    parameters_alike = parameters_alike && (is_first || wide == float32_parameters);
    parameters_alike = parameters_alike && (!wide || parameter->dtype == DType::kFloat32);
    float32_parameters = wide;
    shifted = shifted || !is_vector_aligned(*parameter);
    is_first = false;
  }
  const auto cols = static_cast<int>(a.cols);
  const int sum_bytes = a.sum.data == nullptr ? 0 : size_of(a.sum.dtype);
  const int stream_bytes = adds ? std::max(size_of(a.residual.dtype), sum_bytes) : 0;
  const ForwardPlan plan =
      forward_plan(cols, bytes, stream_bytes, a.dropout.threshold > 0, shifted, device.architecture);
  if (plan.any || !alignment.same || !parameters_alike) return launch_any(a, seed, float64, stream);
  return launch_typed({.input = a.input.data,
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
                       .cols = cols,
                       .float32_parameters = float32_parameters,
                       .first_element = alignment.first_element,
                       .reciprocal_cols = static_cast<float>(1.0 / static_cast<double>(cols)),
                       .eps = static_cast<float>(a.eps),
                       .threshold = a.dropout.threshold,
                       .scale = a.dropout.scale},
                      plan, stream);
}

}  // namespace resnorm::cuda
