// SPDX-License-Identifier: BSD-3-Clause
#include "autocast.h"

#include <ATen/autocast_mode.h>

namespace resnorm {

at::ScalarType autocast_dtype(at::DeviceType device) { return at::autocast::get_autocast_dtype(device); }

Tensor autocast_to(at::ScalarType dtype, const Tensor& tensor, at::DeviceType device) {
  return at::autocast::cached_cast(dtype, tensor, device);
}

OptionalTensor autocast_to(at::ScalarType dtype, const OptionalTensor& tensor, at::DeviceType device) {
  return at::autocast::cached_cast(dtype, tensor, device);
}

}  // namespace resnorm
