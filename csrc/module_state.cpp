// SPDX-License-Identifier: BSD-3-Clause
#include "module_state.h"

namespace py = pybind11;

namespace resnorm {

namespace {

// visit(object) for everything in the row but `skipped`, until it returns false; whether it never did.
template <class Visit>
bool walk_dict(PyObject* dict, const PyObject* skipped, bool into_dicts, const Visit& visit) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) {
    if (value == skipped) continue;
    if (!visit(value)) return false;
    if (into_dicts && PyDict_Check(value) && !(walk_dict(value, skipped, false, visit) && visit(Py_None))) return false;
  }
  return true;
}

template <class Visit>
bool walk(const py::tuple& modules, const PyObject* skipped, const Visit& visit) {
  for (const auto module : modules) {
    if (!visit(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())))) return false;
    const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!attributes) throw py::error_already_set();
    if (!(walk_dict(attributes.ptr(), skipped, true, visit) && visit(Py_None))) return false;
  }
  return true;
}

}  // namespace

py::tuple module_state(const py::tuple& modules) {
  py::list state;
  walk(modules, nullptr, [&](PyObject* object) {
    state.append(py::reinterpret_borrow<py::object>(object));
    return true;
  });
  return py::tuple(state);
}

bool has_module_state(const py::tuple& modules, const py::tuple& state, const py::object& added) {
  const auto size = static_cast<Py_ssize_t>(state.size());
  Py_ssize_t next = 0;
  const bool same = walk(modules, added.ptr(), [&](PyObject* object) {
    return next < size && PyTuple_GET_ITEM(state.ptr(), next++) == object;
  });
  return same && next == size;
}

}  // namespace resnorm
