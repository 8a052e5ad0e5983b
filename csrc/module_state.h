// SPDX-License-Identifier: BSD-3-Clause
// What Python modules hold, compared object by object: a few hundred nanoseconds for a module where Python would take
// ten times as long, and longer where what it touches has left the caches.
#pragma once

#include <pybind11/pybind11.h>

namespace resnorm {

// The type of each of `modules`, the values of its attributes and those of the dicts among them (parameters, buffers,
// submodules, hooks), in one row.
pybind11::tuple module_state(const pybind11::tuple& modules);

// Whether that is still `state`, but for the object `added`: nothing else has been set, added or taken away.
bool has_module_state(const pybind11::tuple& modules, const pybind11::tuple& state, const pybind11::object& added);

}  // namespace resnorm
