// SPDX-License-Identifier: BSD-3-Clause
#include "cuda_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

#include "../../kernels/cuda/norm_backward.h"
#include "../../kernels/cuda/norm_forward.h"
#include "../../kernels/cuda/residual_add.h"
#include "../support/dropout.h"
#include "../support/kernel_plan.h"

namespace resnorm {

namespace {

// The current device, `index`, asked when it is first used: to ask about others would make contexts on them.
const cuda::Device& current_device(const char* op, c10::DeviceIndex index) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cuda::Device> devices;
  const std::lock_guard lock(mutex);
  if (const auto known = devices.find(index); known != devices.end()) return known->second;
  cuda::Device found = {};
  const auto error = cuda::find_device(found);
  TORCH_CHECK(error == cudaSuccess, op, ": no kernels for ", c10::Device(c10::kCUDA, index), ": ",
              cudaGetErrorString(error), ". `python -m resnorm_ext info` says what was compiled.");
  return devices.emplace(index, found).first->second;
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
    : op_(op), guard_(tensor.device()), device_(current_device(op, tensor.device().index())) {}

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
