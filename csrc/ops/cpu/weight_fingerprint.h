// SPDX-License-Identifier: BSD-3-Clause
// Tells whether weights are still the ones that a copy of them was made from.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace resnorm {

// A hash of each tensor's storage address, offset, sizes, strides, dtype and version, and of a few of its values, in
// case memory is written behind torch's back. As long as the storages are kept alive, an equal fingerprint means the
// same weights, but for writes that torch does not count (through `.data`: data_writes.h) and that miss every sampled
// value.
int64_t weight_fingerprint(const std::vector<at::Tensor>& weights);

}  // namespace resnorm
