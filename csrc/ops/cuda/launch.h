// SPDX-License-Identifier: BSD-3-Clause
// What every launch needs besides its operands.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <vector>

#include "../../kernels/cuda/device.h"
#include "../checks.h"
#include "../dropout.h"
#include "../kernel_plan.h"
#include "../operands.h"

namespace resnorm {

// The current device, as far as plans depend on it.
inline cuda::Device current_device() {
  static const std::vector<cuda::Device> devices = [] {
    std::vector<cuda::Device> found(c10::cuda::device_count());
    for (int index = 0; index < static_cast<int>(found.size()); ++index) {
      int major = 0, minor = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
      found[index].architecture = 10 * major + minor;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&found[index].multiprocessors, cudaDevAttrMultiProcessorCount, index));
    }
    return found;
  }();
  return devices[c10::cuda::current_device()];
}

// The seed itself stays on the device.
inline Dropout dropout_of(double p) {
  const auto threshold = dropout_threshold(p);
  return {.threshold = threshold, .scale = dropout_scale(threshold)};
}

inline const std::int64_t* seed_address(const Dropout& dropout, const OptionalTensor& seed) {
  return dropout.threshold > 0 ? seed->const_data_ptr<std::int64_t>() : nullptr;
}

inline Tensor device_workspace(std::size_t bytes, const Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

inline void check_launch(cudaError_t error, const char* op, RowCounts counts, const cuda::Plan& plan) {
  TORCH_CHECK(error == cudaSuccess, op, ": launching the kernel for ", counts.rows, " rows of ", counts.cols,
              " elements failed on sm_", current_device().architecture, " (", describe(plan),
              "): ", cudaGetErrorString(error));
}

}  // namespace resnorm
