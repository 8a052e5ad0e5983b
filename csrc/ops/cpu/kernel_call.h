// SPDX-License-Identifier: BSD-3-Clause
// What a call of a CPU kernel needs besides its operands.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../../kernels/cpu/kernels.h"
#include "../operands.h"

namespace resnorm {

// The kernels in use; an unknown RESNORM_CPU_ISA is a ValueError.
const cpu::KernelTable& cpu_kernels();

// PyTorch's own thread pool, as the kernels call it.
void parallel_for(int64_t count, int64_t grain, cpu::RangeBody body, const void* context);

Dropout kernel_dropout(double p, const std::optional<at::Tensor>& seed);

// Scratch memory for a backward pass that sums `column_sums` columns' gradients.
at::Tensor backward_workspace(RowCounts counts, int column_sums, at::ScalarType accumulation);

}  // namespace resnorm
