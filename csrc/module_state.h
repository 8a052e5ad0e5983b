// SPDX-License-Identifier: BSD-3-Clause
// What Python modules hold, compared object by object: a few hundred nanoseconds for a module where Python would take
// ten times as long, and longer where what it touches has left the caches.
#pragma once

#include <pybind11/pybind11.h>

namespace resnorm {

// The type of each of `modules`, the values of its attributes and those of the dicts among them (parameters, buffers,
// submodules, hooks), in one row, but for instances of the class `skipped`.
pybind11::tuple module_state(const pybind11::tuple& modules, const pybind11::type& skipped);

// Whether that is still `state`: nothing else has been set, added or taken away.
bool has_module_state(const pybind11::tuple& modules, const pybind11::tuple& state, const pybind11::type& skipped);

// The index of the first of `owners` (classes, Python modules) whose attribute of that name is not the object in
// `values`; -1 where there is none, and -2 where besides a TorchFunctionMode is active: whether somebody has put
// functions of their own in the place of a library's, or watches them.
Py_ssize_t first_changed(const pybind11::tuple& owners, const pybind11::tuple& names, const pybind11::tuple& values);

}  // namespace resnorm
