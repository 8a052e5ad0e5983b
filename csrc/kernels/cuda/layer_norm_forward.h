// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/kernels.h"

namespace resnorm::cuda {

// As the CPU kernel of the same name, on device pointers, for at least one row and column; asynchronous on `stream`.
// Returns whether the launch succeeded.
cudaError_t layer_norm_forward(const cpu::LayerNormForward& arguments, cudaStream_t stream);

}  // namespace resnorm::cuda
