// SPDX-License-Identifier: BSD-3-Clause
// The operators that have kernels on every device, on the CPU. Those that only the CPU has kernels for register
// themselves, in *_cpu.cpp.
#include "../norm_device.h"
#include "../residual_add_device.h"
#include "cpu_kernels.h"

namespace resnorm {

TORCH_LIBRARY_IMPL(resnorm, CPU, m) {
  NormsOn<CpuKernels>::implement(m);
  ResidualAddOn<CpuKernels>::implement(m);
}

}  // namespace resnorm
