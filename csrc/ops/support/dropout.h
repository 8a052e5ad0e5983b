// SPDX-License-Identifier: BSD-3-Clause
// Dropout as every device applies it: an element is dropped where its 16-bit Philox draw is below a threshold, and kept
// values are scaled so that the expectation is exact.
#pragma once

#include <cstdint>

namespace resnorm {

// floor(65536 p + 1/2): 0 acts as no dropout, 65536 as p = 1.
inline std::uint32_t dropout_threshold(double p) { return static_cast<std::uint32_t>(65536.0 * p + 0.5); }

// A float32, computed on the host for all devices.
inline float dropout_scale(std::uint32_t threshold) {
  return threshold == 65536 ? 1.0F : static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
}

}  // namespace resnorm
