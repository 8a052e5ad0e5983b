// SPDX-License-Identifier: BSD-3-Clause
// Launching a kernel: on a stream, or in the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "device.h"
#include "primitives.cuh"

namespace resnorm::cuda {

struct LaunchShape {
  int blocks, cluster, threads, shared_bytes;
};

// A kernel whose template arguments are forgotten.
template <class Arguments>
struct Kernel {
  cudaError_t (*launch)(const LaunchShape& shape, cudaStream_t stream, const Arguments& arguments) = nullptr;
  // How many clusters of this shape the device runs at once, whatever shape.blocks says.
  cudaError_t (*count_resident_clusters)(const LaunchShape& shape, const Device& device, int& clusters) = nullptr;
};

#ifdef __CUDACC__
// A kernel has 48 KiB of shared memory unless it asks for more; asking once for all that there is costs later launches
// nothing.
template <auto kernel>
cudaError_t grant_shared_memory(int bytes) {
  constexpr int kGrantedBytes = 48 << 10;
  if (bytes <= kGrantedBytes) return cudaSuccess;
  static std::atomic<std::uint64_t> granted{0};  // one bit a device
  int device = 0, most = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const auto bit = std::uint64_t{1} << (device % 64);
  if (device < 64 && (granted.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  auto error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) granted.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute cluster = {};

  LaunchConfig(const LaunchShape& shape, cudaStream_t on) : cudaLaunchConfig_t{} {
    gridDim = dim3(static_cast<unsigned>(shape.blocks));
    blockDim = dim3(static_cast<unsigned>(shape.threads));
    dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
    stream = on;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    attrs = &cluster;
    numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  if (const auto error = grant_shared_memory<kernel>(shape.shared_bytes); error != cudaSuccess) return error;
  const LaunchConfig config(shape, stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <auto kernel>
cudaError_t count_resident_clusters(const LaunchShape& shape, const Device&, int& clusters) {
  if (const auto error = grant_shared_memory<kernel>(shape.shared_bytes); error != cudaSuccess) return error;
  const LaunchConfig config(shape, nullptr);
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
}
#else
template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  simt::launch({shape.blocks, shape.cluster, shape.threads, shape.shared_bytes}, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <auto kernel>
cudaError_t count_resident_clusters(const LaunchShape& shape, const Device& device, int& clusters) {
  clusters = device.multiprocessors / shape.cluster;
  return cudaSuccess;
}
#endif

template <auto kernel, class Arguments>
constexpr Kernel<Arguments> kernel_of() {
  return {launch<kernel, Arguments>, count_resident_clusters<kernel>};
}

}  // namespace resnorm::cuda
