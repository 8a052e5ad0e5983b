// SPDX-License-Identifier: BSD-3-Clause
#include "../device/layer_norm.h"

#include "kernel_call.h"

namespace resnorm {

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { LayerNormOn<CpuKernels>::implement(m); }

}  // namespace resnorm
