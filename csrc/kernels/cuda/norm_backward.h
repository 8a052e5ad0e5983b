// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../arguments.h"
#include "device.h"

namespace resnorm::cuda {

// As the CPU kernel add_layer_norm_backward, on device pointers, for at least one column; layer_norm's where `adds` is
// false, of which grad_input is then the gradient. Dropout's seed lies at `seed`, on the device too. Asynchronous on
// `stream` of the current device. Returns whether the launches succeeded.
cudaError_t norm_backward(const AddLayerNormBackward& arguments, bool adds, const std::int64_t* seed,
                          const Device& device, cudaStream_t stream);

// Bytes that arguments.workspace must have: partial sums of the columns, one row of them a multiprocessor.
std::size_t norm_backward_workspace_bytes(const AddLayerNormBackward& arguments, const Device& device);

}  // namespace resnorm::cuda
