// SPDX-License-Identifier: BSD-3-Clause
// LayerNorm forward: y = (x - mean) * rstd * weight + bias, row by row.
//
// Mapping: one block of 256 threads a row, each thread every 256th element; a row is read from memory once and twice
// more from cache. Any number of rows and columns, any row stride and alignment. Numerics, as on the CPU: with d = x -
// mean and delta = sum(d) / N, which is what rounding left in the mean, var = sum(d^2) / N - delta^2 and
// y = (d - delta) * rstd; sums in float32, in float64 for float64.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "layer_norm_forward.h"

namespace resnorm::cuda {

namespace {

using cpu::ConstVector;
using cpu::DType;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr std::int64_t kMaxBlocks = 0x7fffffff;

template <typename T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
__device__ A load(const ConstVector& vector, std::int64_t i) {
  switch (vector.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(vector.data)[i];
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(vector.data)[i]);
    case DType::kBFloat16:
      return static_cast<float>(static_cast<const __nv_bfloat16*>(vector.data)[i]);
    default:
      return static_cast<float>(static_cast<const __half*>(vector.data)[i]);
  }
}

// The sum over the block's threads, the same in each of them.
template <typename A>
__device__ A block_sum(A value) {
  __shared__ A warp_sums[kThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  A total = 0;
  for (const A warp_sum : warp_sums) total += warp_sum;
  __syncthreads();  // before the next sum overwrites what a slower thread still reads
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) layer_norm_forward_kernel(const cpu::LayerNormForward p) {
  using A = Accumulation<T>;
  for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.input.data) + row * p.input.row_stride;
    T* y = static_cast<T*>(p.output.data) + row * p.output.row_stride;

    A sum = 0;
    for (std::int64_t i = threadIdx.x; i < p.cols; i += kThreads) sum += static_cast<A>(x[i]);
    const A mean = block_sum(sum) / static_cast<A>(p.cols);

    A deviations = 0, squares = 0;
    for (std::int64_t i = threadIdx.x; i < p.cols; i += kThreads) {
      const A d = static_cast<A>(x[i]) - mean;
      deviations += d;
      squares += d * d;
    }
    const A delta = block_sum(deviations) / static_cast<A>(p.cols);
    const A variance = block_sum(squares) / static_cast<A>(p.cols) - delta * delta;
    const A positive = variance < A(0) ? A(0) : variance;  // a NaN stays one
    const A rstd = A(1) / std::sqrt(positive + static_cast<A>(p.eps));

    if (threadIdx.x == 0) {
      if (p.mean != nullptr) static_cast<A*>(p.mean)[row] = mean + delta;
      if (p.rstd != nullptr) static_cast<A*>(p.rstd)[row] = rstd;
    }
    for (std::int64_t i = threadIdx.x; i < p.cols; i += kThreads) {
      A value = (static_cast<A>(x[i]) - mean - delta) * rstd;
      if (p.weight.data != nullptr) value *= load<A>(p.weight, i);
      if (p.bias.data != nullptr) value += load<A>(p.bias, i);
      y[i] = static_cast<T>(value);
    }
  }
}

template <typename T>
cudaError_t launch(const cpu::LayerNormForward& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min(arguments.rows, kMaxBlocks));
  layer_norm_forward_kernel<T><<<blocks, kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t layer_norm_forward(const cpu::LayerNormForward& arguments, cudaStream_t stream) {
  switch (arguments.input.dtype) {
    case DType::kFloat32:
      return launch<float>(arguments, stream);
    case DType::kFloat64:
      return launch<double>(arguments, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(arguments, stream);
    case DType::kFloat16:
      return launch<__half>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace resnorm::cuda
