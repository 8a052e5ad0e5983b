// SPDX-License-Identifier: BSD-3-Clause
// The norms' backward pass, on device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../arguments.h"
#include "device.h"
#include "plan.h"

namespace resnorm::cuda {

Plan norm_backward_plan(const NormBackward& arguments, const Device& device);

// Bytes that arguments.workspace must have: partial sums of the columns, at most one row of them a multiprocessor.
std::size_t norm_backward_workspace_bytes(const NormBackward& arguments, const Plan& plan);

// As the CPU kernel norm_backward, for at least one column. Dropout's seed lies at `seed`, on the device too.
// Asynchronous on `stream` of the current device. Returns whether the launches succeeded.
cudaError_t norm_backward(const NormBackward& arguments, const Plan& plan, const std::int64_t* seed,
                          cudaStream_t stream);

}  // namespace resnorm::cuda
