// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace resnorm::cuda {

// A GPU, as far as plans depend on it.
struct Device {
  int architecture;  // 90 for sm_90
  int multiprocessors;
};

}  // namespace resnorm::cuda
