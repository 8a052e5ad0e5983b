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
  cudaError_t (*count_resident_clusters)(LaunchShape shape, const Device& device, int& clusters) = nullptr;
};

#ifdef __CUDACC__
// Reported by its caller, so the runtime is to forget it: else the next kernel, of anybody, would find it.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// A kernel has 48 KiB of shared memory unless it asks for more; asking once for all that there is costs later launches
// nothing.
template <auto kernel>
cudaError_t grant_shared_memory(int bytes) {
  constexpr int kGrantedBytes = 48 << 10;
  if (bytes <= kGrantedBytes) return cudaSuccess;
  constexpr int kDevices = 64;  // one beyond them is asked every time
  static std::atomic<bool> granted[kDevices] = {};
  int device = 0, most = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device < kDevices && granted[device].load(std::memory_order_relaxed)) return cudaSuccess;
  auto error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && device < kDevices) granted[device].store(true, std::memory_order_relaxed);
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
  if (const auto error = grant_shared_memory<kernel>(shape.shared_bytes); error != cudaSuccess) return cleared(error);
  const LaunchConfig config(shape, stream);
  return cleared(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <auto kernel>
cudaError_t count_resident_clusters(LaunchShape shape, const Device&, int& clusters) {
  if (const auto error = grant_shared_memory<kernel>(shape.shared_bytes); error != cudaSuccess) return cleared(error);
  shape.blocks = shape.cluster;  // the driver refuses a grid that is no multiple of it
  const LaunchConfig config(shape, nullptr);
  return cleared(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
}
#else
template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  simt::launch({shape.blocks, shape.cluster, shape.threads, shape.shared_bytes}, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <auto kernel>
cudaError_t count_resident_clusters(LaunchShape shape, const Device& device, int& clusters) {
  clusters = device.multiprocessors / shape.cluster;
  return cudaSuccess;
}
#endif

template <auto kernel, class Arguments>
constexpr Kernel<Arguments> kernel_of() {
  return {launch<kernel, Arguments>, count_resident_clusters<kernel>};
}

}  // namespace resnorm::cuda
