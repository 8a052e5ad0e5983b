// SPDX-License-Identifier: BSD-3-Clause
#include "../device/add_layer_norm.h"

#include "kernel_call.h"

namespace resnorm {

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) { AddLayerNormOn<CudaKernels>::implement(m); }

}  // namespace resnorm
