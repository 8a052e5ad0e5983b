// SPDX-License-Identifier: BSD-3-Clause
// The norms, forward, on device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"
#include "device.h"
#include "plan.h"

namespace resnorm::cuda {

Plan norm_forward_plan(const NormForward& arguments, const Device& device);

// As the CPU kernel norm_forward, for at least one row and column. Dropout's seed lies at `seed`, on the device too.
// Asynchronous on `stream` of the current device. Returns whether the launch succeeded.
cudaError_t norm_forward(const NormForward& arguments, const Plan& plan, const std::int64_t* seed, cudaStream_t stream);

}  // namespace resnorm::cuda
