// SPDX-License-Identifier: BSD-3-Clause
// layer_norm and add_layer_norm, forward, on device pointers. Without a residual it is layer_norm.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"
#include "device.h"
#include "plan.h"

namespace resnorm::cuda {

Plan norm_forward_plan(const AddLayerNormForward& arguments, const Device& device);

// As the CPU kernel add_layer_norm_forward, for at least one row and column. Dropout's seed lies at `seed`, on the
// device too. Asynchronous on `stream` of the current device. Returns whether the launch succeeded.
cudaError_t norm_forward(const AddLayerNormForward& arguments, const Plan& plan, const std::int64_t* seed,
                         cudaStream_t stream);

}  // namespace resnorm::cuda
