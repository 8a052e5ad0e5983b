// SPDX-License-Identifier: BSD-3-Clause
#include "../device/residual_add.h"

#include "kernel_call.h"

namespace resnorm {

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) { ResidualAddOn<CudaKernels>::implement(m); }

}  // namespace resnorm
