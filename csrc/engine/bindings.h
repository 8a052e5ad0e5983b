// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <pybind11/pybind11.h>

namespace resnorm::engine {

// Adds what Python builds layers from, and runs them by.
void bind(pybind11::module_& m);

}  // namespace resnorm::engine
