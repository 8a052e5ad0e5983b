// SPDX-License-Identifier: BSD-3-Clause
#include "../device/residual_add.h"

#include "kernel_call.h"

namespace resnorm {

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { ResidualAddOn<CpuKernels>::implement(m); }

}  // namespace resnorm
