// SPDX-License-Identifier: BSD-3-Clause
// For functions that kernels and the host call.
#pragma once

#ifdef __CUDACC__
#define RESNORM_HOST_DEVICE __host__ __device__
#else
#define RESNORM_HOST_DEVICE
#endif
