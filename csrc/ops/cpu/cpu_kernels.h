// SPDX-License-Identifier: BSD-3-Clause
// The CPU's kernels, as the operators call them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../../kernels/cpu/kernels.h"

namespace resnorm {

// The kernels in use; an unknown RESNORM_CPU_ISA is a ValueError.
const cpu::KernelTable& cpu_kernels();

// PyTorch's own thread pool, as the kernels call it.
void parallel_for(int64_t count, int64_t grain, cpu::RangeBody body, const void* context);

// Frees what the kernels keep on the calling thread and on those of its pool; returns how many bytes that was.
int64_t free_workspaces();

// One call's, for the operators' *_device.h.
class CpuKernels {
 public:
  CpuKernels(const char*, const at::Tensor&) {}

  static Dropout dropout(double p, const std::optional<at::Tensor>& seed);

  // A backward pass has its workspace from here.
  static void run(const NormForward& arguments);
  static void run(const NormBackward& arguments);
  static void run(const ResidualAddForward& arguments);
  static void run(const ResidualAddBackward& arguments);
  static void run(const BiasActivationForward& arguments);
  static void run(const BiasActivationBackward& arguments);
};

}  // namespace resnorm
