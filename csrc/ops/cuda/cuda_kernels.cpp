// SPDX-License-Identifier: BSD-3-Clause
#include "cuda_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "../../kernels/cuda/norm_backward.h"
#include "../../kernels/cuda/norm_forward.h"
#include "../../kernels/cuda/residual_add.h"
#include "../support/dropout.h"
#include "../support/kernel_plan.h"

namespace resnorm {

namespace {

const cuda::Device& properties_of(c10::DeviceIndex device) {
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
  return devices[device];
}

template <class Arguments>
void check_launch(cudaError_t error, const char* op, const Arguments& arguments, const cuda::Plan& plan,
                  const cuda::Device& device) {
  TORCH_CHECK(error == cudaSuccess, op, ": launching the kernel for ", arguments.rows, " rows of ", arguments.cols,
              " elements failed on sm_", device.architecture, " (", describe(plan), "): ", cudaGetErrorString(error));
}

at::Tensor workspace_of(std::size_t bytes, const c10::cuda::CUDAGuard& guard) {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(guard.current_device()));
}

}  // namespace

CudaKernels::CudaKernels(const char* op, const at::Tensor& tensor)
    : op_(op), guard_(tensor.device()), device_(properties_of(tensor.device().index())) {}

Dropout CudaKernels::dropout(double p, const std::optional<at::Tensor>& seed) {
  const auto threshold = dropout_threshold(p);
  if (threshold > 0) seed_ = seed->const_data_ptr<std::int64_t>();
  return {.threshold = threshold, .scale = dropout_scale(threshold)};
}

void CudaKernels::run(const NormForward& a) const {
  const auto plan = cuda::norm_forward_plan(a, device_);
  check_launch(cuda::norm_forward(a, plan, seed_, c10::cuda::getCurrentCUDAStream()), op_, a, plan, device_);
}

void CudaKernels::run(const NormBackward& arguments) const {
  auto a = arguments;
  const auto plan = cuda::norm_backward_plan(a, device_);
  const auto workspace = workspace_of(cuda::norm_backward_workspace_bytes(a, plan), guard_);
  a.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::norm_backward(a, plan, seed_, c10::cuda::getCurrentCUDAStream()), op_, a, plan, device_);
}

void CudaKernels::run(const ResidualAddForward& a) const {
  const auto plan = cuda::residual_add_forward_plan(a);
  check_launch(cuda::residual_add_forward(a, plan, seed_, c10::cuda::getCurrentCUDAStream()), op_, a, plan, device_);
}

void CudaKernels::run(const ResidualAddBackward& arguments) const {
  auto a = arguments;
  const auto plan = cuda::residual_add_backward_plan(a, device_);
  const auto workspace = workspace_of(cuda::residual_add_backward_workspace_bytes(a, plan), guard_);
  a.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::residual_add_backward(a, plan, seed_, c10::cuda::getCurrentCUDAStream()), op_, a, plan, device_);
}

}  // namespace resnorm
