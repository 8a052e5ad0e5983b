// SPDX-License-Identifier: BSD-3-Clause
// What the operators ask of autocast, through one unit: torch's header of it declares every operator that torch has.
#pragma once

#include "checks.h"

namespace resnorm {

// The dtype that autocast computes in on `device`.
at::ScalarType autocast_dtype(at::DeviceType device);

// `tensor` in `dtype`, where it is a floating one on `device`; a parameter is cast once for all that autocast covers.
Tensor autocast_to(at::ScalarType dtype, const Tensor& tensor, at::DeviceType device);
OptionalTensor autocast_to(at::ScalarType dtype, const OptionalTensor& tensor, at::DeviceType device);

}  // namespace resnorm
