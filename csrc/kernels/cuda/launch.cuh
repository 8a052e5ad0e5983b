// SPDX-License-Identifier: BSD-3-Clause
// Launching a kernel: on a stream, or in the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include "primitives.cuh"

namespace resnorm::cuda {

struct LaunchShape {
  int blocks, cluster, threads, shared_bytes;
};

#ifdef __CUDACC__
template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  constexpr int kGrantedBytes = 48 << 10;  // of shared memory; more has to be asked for
  if (shape.shared_bytes > kGrantedBytes) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#else
template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  simt::launch({shape.blocks, shape.cluster, shape.threads, shape.shared_bytes}, [&] { kernel(arguments...); });
  return cudaSuccess;
}
#endif

}  // namespace resnorm::cuda
