// SPDX-License-Identifier: BSD-3-Clause
// What every launch needs besides its operands.
#pragma once

#include <ATen/cuda/CUDAContext.h>

#include "../../kernels/cuda/device.h"
#include "../checks.h"
#include "../dropout.h"
#include "../operands.h"

namespace resnorm {

// The current device, as far as plans depend on it.
inline cuda::Device current_device() {
  const auto* properties = at::cuda::getCurrentDeviceProperties();
  return {10 * properties->major + properties->minor, properties->multiProcessorCount};
}

// The seed itself stays on the device.
inline Dropout dropout_of(double p) {
  const auto threshold = dropout_threshold(p);
  return {.threshold = threshold, .scale = dropout_scale(threshold)};
}

inline const std::int64_t* seed_address(const Dropout& dropout, const OptionalTensor& seed) {
  return dropout.threshold > 0 ? seed->const_data_ptr<std::int64_t>() : nullptr;
}

inline void check_launch(cudaError_t error, const char* op, RowCounts counts) {
  TORCH_CHECK(error == cudaSuccess, op, ": launching the kernel for ", counts.rows, " rows of ", counts.cols,
              " elements failed on ", at::cuda::getCurrentDeviceProperties()->name, ": ", cudaGetErrorString(error));
}

}  // namespace resnorm
