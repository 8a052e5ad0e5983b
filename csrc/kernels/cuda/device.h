// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cuda_runtime_api.h>

namespace resnorm::cuda {

// A GPU, as far as plans depend on it.
struct Device {
  int architecture;  // that the code it runs is compiled for, 90 for sm_90; the GPU's own may be newer
  int multiprocessors;
  int shared_bytes;  // of shared memory that a block may have
};

// The current one's.
cudaError_t find_device(Device& device);

}  // namespace resnorm::cuda
