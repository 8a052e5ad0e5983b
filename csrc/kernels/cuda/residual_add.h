// SPDX-License-Identifier: BSD-3-Clause
// residual_add, forward and backward, on device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../arguments.h"
#include "device.h"
#include "plan.h"

namespace resnorm::cuda {

Plan residual_add_forward_plan(const ResidualAddForward& arguments);

// As the CPU kernels of the same names, for at least one row and column (backward: one column). Dropout's seed lies at
// `seed`, on the device too. Asynchronous on `stream` of the current device. They return whether the launches
// succeeded.
cudaError_t residual_add_forward(const ResidualAddForward& arguments, const Plan& plan, const std::int64_t* seed,
                                 cudaStream_t stream);

Plan residual_add_backward_plan(const ResidualAddBackward& arguments, const Device& device);

// Bytes that arguments.workspace must have: partial sums of the columns, at most one row of them a multiprocessor.
std::size_t residual_add_backward_workspace_bytes(const ResidualAddBackward& arguments, const Plan& plan);

cudaError_t residual_add_backward(const ResidualAddBackward& arguments, const Plan& plan, const std::int64_t* seed,
                                  cudaStream_t stream);

}  // namespace resnorm::cuda
