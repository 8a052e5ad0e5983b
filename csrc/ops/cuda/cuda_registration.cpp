// SPDX-License-Identifier: BSD-3-Clause
#include "../norm_device.h"
#include "../residual_add_device.h"
#include "cuda_kernels.h"

namespace resnorm {

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) {
  NormsOn<CudaKernels>::implement(m);
  ResidualAddOn<CudaKernels>::implement(m);
}

}  // namespace resnorm
