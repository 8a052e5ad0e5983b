// SPDX-License-Identifier: BSD-3-Clause
// Who multiplies: none is the fastest one on every CPU, so whoever has measured says it here.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

namespace resnorm {

// The last is the project's own kernel (prepacked_linear.h).
enum class LinearBackend { kAten, kOneDnn, kResnorm };

// ATen unless set_linear_backend or the environment (RESNORM_LINEAR=aten|onednn|resnorm, which wins) says another, and
// this PyTorch and CPU can do it.
LinearBackend linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features);

// For the whole process.
void set_linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features, LinearBackend backend);

LinearBackend parse_linear_backend(const std::string& name);
std::string name_of(LinearBackend backend);

// What RESNORM_LINEAR says, empty where it says nothing. Anything but the names is a ValueError.
const std::string& linear_backend_override();

}  // namespace resnorm
