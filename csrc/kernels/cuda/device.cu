// SPDX-License-Identifier: BSD-3-Clause
#include "device.h"
#include "launch.cuh"

namespace resnorm::cuda {

#ifdef __CUDACC__
namespace {

__global__ void compiled_like_all_others() {}

}  // namespace

// What is compiled for an older architecture has what that one has, on whatever GPU it runs: a plan for the GPU's own
// could ask for a kernel that is empty there.
cudaError_t find_device(Device& device) {
  int index = 0;
  cudaFuncAttributes code = {};
  auto error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, compiled_like_all_others);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  device.architecture = code.ptxVersion;
  return cleared(error);
}
#endif

}  // namespace resnorm::cuda
