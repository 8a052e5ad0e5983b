// SPDX-License-Identifier: BSD-3-Clause
// Launching a kernel: on a stream, or in the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "device.h"
#include "primitives.cuh"

namespace resnorm::cuda {

struct LaunchShape {
  int blocks, cluster, threads, shared_bytes;
  // It may begin while the kernel before it on the stream ends: it waits by itself, by await_previous_kernel().
  bool overlaps = false;
};

// A kernel whose template arguments are forgotten.
template <class Arguments>
struct Kernel {
  cudaError_t (*launch)(const LaunchShape& shape, cudaStream_t stream, const Arguments& arguments) = nullptr;
  // How many clusters of this shape the device runs at once, whatever shape.blocks says.
  cudaError_t (*count_resident_clusters)(const LaunchShape& shape, const Device& device, int& clusters) = nullptr;
};

#ifdef __CUDACC__
// Reported by its caller, so the runtime is to forget it: else the next kernel, of anybody, would find it.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// What the driver has said of kernels, so that it is asked once for each device and whatever else is in Key.
template <class... Key>
class Answers {
 public:
  // ask(device, answer) asks the driver.
  template <class Ask>
  cudaError_t find(int& answer, const Ask& ask, const Key&... key) {
    int device = 0;
    if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return cleared(error);
    const std::lock_guard lock(mutex_);
    if (const auto known = answers_.find({device, key...}); known != answers_.end()) {
      answer = known->second;
      return cudaSuccess;
    }
    const auto error = cleared(ask(device, answer));
    if (error == cudaSuccess) answers_.insert({{device, key...}, answer});
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<std::tuple<int, Key...>, int> answers_;
};

// A kernel has 48 KiB of shared memory unless it asks for more: for all that there is.
inline cudaError_t grant_shared_memory(const void* kernel, int bytes) {
  constexpr int kGrantedBytes = 48 << 10;
  if (bytes <= kGrantedBytes) return cudaSuccess;
  static Answers<const void*> granted;
  const auto grant = [&](int device, int& most) {
    const auto error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  };
  int most = 0;
  return granted.find(most, grant, kernel);
}

struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute attributes[2] = {};

  LaunchConfig(const LaunchShape& shape, cudaStream_t on) : cudaLaunchConfig_t{} {
    gridDim = dim3(static_cast<unsigned>(shape.blocks));
    blockDim = dim3(static_cast<unsigned>(shape.threads));
    dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
    stream = on;
    attrs = attributes;
    if (shape.cluster > 1) {
      attributes[numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
    if (shape.overlaps && !is_captured(on)) {
      attributes[numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  // Older drivers cannot record an overlapping launch in a graph, and an allocator that walks a graph's edges need not
  // know of it.
  static bool is_captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cleared(cudaStreamIsCapturing(stream, &status)) != cudaSuccess || status != cudaStreamCaptureStatusNone;
  }
};

template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  const auto* const function = reinterpret_cast<const void*>(kernel);
  if (const auto error = grant_shared_memory(function, shape.shared_bytes); error != cudaSuccess) return error;
  const LaunchConfig config(shape, stream);
  return cleared(cudaLaunchKernelEx(&config, kernel, arguments...));
}

inline cudaError_t count_resident_clusters(const void* kernel, LaunchShape shape, int& clusters) {
  if (const auto error = grant_shared_memory(kernel, shape.shared_bytes); error != cudaSuccess) return error;
  shape.blocks = shape.cluster;  // the driver refuses a grid that is no multiple of it
  shape.overlaps = false;
  static Answers<const void*, int, int, int> counted;
  const auto count = [&](int, int& clusters) {
    const LaunchConfig config(shape, nullptr);
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  };
  return counted.find(clusters, count, kernel, shape.cluster, shape.threads, shape.shared_bytes);
}

template <auto kernel>
cudaError_t count_resident_clusters(const LaunchShape& shape, const Device&, int& clusters) {
  return count_resident_clusters(reinterpret_cast<const void*>(kernel), shape, clusters);
}
#else
template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  simt::launch({shape.blocks, shape.cluster, shape.threads, shape.shared_bytes, shape.overlaps},
               [&] { kernel(arguments...); });
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
