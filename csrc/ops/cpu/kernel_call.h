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

// One call's, for the operators of ../device.
class CpuKernels {
 public:
  CpuKernels(const char*, const at::Tensor&) {}

  Dropout dropout(double p, const std::optional<at::Tensor>& seed) const;

  // A backward pass has its workspace from here.
  void run(const LayerNormForward& arguments) const;
  void run(const LayerNormBackward& arguments) const;
  void run(const AddLayerNormForward& arguments) const;
  void run(const AddLayerNormBackward& arguments) const;
  void run(const ResidualAddForward& arguments) const;
  void run(const ResidualAddBackward& arguments) const;
};

}  // namespace resnorm
