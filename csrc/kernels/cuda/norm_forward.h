// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"
#include "device.h"

namespace resnorm::cuda {

// As the CPU kernel add_layer_norm_forward, on device pointers, for at least one row and column; without a residual it
// is layer_norm. Dropout's seed lies at `seed`, on the device too. Asynchronous on `stream` of the current device.
// Returns whether the launch succeeded.
cudaError_t norm_forward(const AddLayerNormForward& arguments, const std::int64_t* seed, const Device& device,
                         cudaStream_t stream);

}  // namespace resnorm::cuda
