// SPDX-License-Identifier: BSD-3-Clause
// The backward passes of layer_norm and add_layer_norm, on device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../arguments.h"
#include "device.h"
#include "plan.h"

namespace resnorm::cuda {

// `adds` tells add_layer_norm's pass from layer_norm's, of which grad_input is the gradient.
Plan norm_backward_plan(const AddLayerNormBackward& arguments, bool adds, const Device& device);

// Bytes that arguments.workspace must have: partial sums of the columns, at most one row of them a multiprocessor.
std::size_t norm_backward_workspace_bytes(const AddLayerNormBackward& arguments, const Plan& plan);

// As the CPU kernel add_layer_norm_backward, for at least one column. Dropout's seed lies at `seed`, on the device too.
// Asynchronous on `stream` of the current device. Returns whether the launches succeeded.
cudaError_t norm_backward(const AddLayerNormBackward& arguments, bool adds, const Plan& plan, const std::int64_t* seed,
                          cudaStream_t stream);

}  // namespace resnorm::cuda
