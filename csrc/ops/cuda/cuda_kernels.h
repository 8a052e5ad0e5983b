// SPDX-License-Identifier: BSD-3-Clause
// CUDA's kernels, as the operators call them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>

#include <optional>

#include "../../kernels/arguments.h"
#include "../../kernels/cuda/device.h"

namespace resnorm {

// One call's, for the operators' *_device.h: on the device of its tensors and that device's current stream.
class CudaKernels {
 public:
  // `op` names the call where a launch fails.
  CudaKernels(const char* op, const at::Tensor& tensor);

  // The seed itself stays on the device, where a captured graph reads it anew with each replay.
  Dropout dropout(double p, const std::optional<at::Tensor>& seed);

  // A backward pass has its workspace from here.
  void run(const NormForward& arguments) const;
  void run(const NormBackward& arguments) const;
  void run(const ResidualAddForward& arguments) const;
  void run(const ResidualAddBackward& arguments) const;

 private:
  const char* op_;
  c10::cuda::CUDAGuard guard_;
  cuda::Device device_;
  const std::int64_t* seed_ = nullptr;
};

}  // namespace resnorm
