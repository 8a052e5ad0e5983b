// SPDX-License-Identifier: BSD-3-Clause
#include "module_state.h"

#include <ATen/PythonTorchFunctionTLS.h>

namespace py = pybind11;

namespace resnorm {

namespace {

// visit(object) for everything in the row but instances of `skipped`, until it returns false; whether it never did.
template <class Visit>
bool walk_dict(PyObject* dict, PyTypeObject* skipped, bool into_dicts, const Visit& visit) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) {
    if (PyObject_TypeCheck(value, skipped)) continue;
    if (!visit(value)) return false;
    if (into_dicts && PyDict_Check(value) && !(walk_dict(value, skipped, false, visit) && visit(Py_None))) return false;
  }
  return true;
}

template <class Visit>
bool walk(const py::tuple& modules, const py::type& skipped, const Visit& visit) {
  auto* const skipped_type = reinterpret_cast<PyTypeObject*>(skipped.ptr());
  for (const auto module : modules) {
    if (!visit(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())))) return false;
    const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!attributes) throw py::error_already_set();
    if (!(walk_dict(attributes.ptr(), skipped_type, true, visit) && visit(Py_None))) return false;
  }
  return true;
}

}  // namespace

py::tuple module_state(const py::tuple& modules, const py::type& skipped) {
  py::list state;
  walk(modules, skipped, [&](PyObject* object) {
    state.append(py::reinterpret_borrow<py::object>(object));
    return true;
  });
  return py::tuple(state);
}

bool has_module_state(const py::tuple& modules, const py::tuple& state, const py::type& skipped) {
  const auto size = static_cast<Py_ssize_t>(state.size());
  Py_ssize_t next = 0;
  const bool same = walk(modules, skipped, [&](PyObject* object) {
    return next < size && PyTuple_GET_ITEM(state.ptr(), next++) == object;
  });
  return same && next == size;
}

Py_ssize_t first_changed(const py::tuple& owners, const py::tuple& names, const py::tuple& values) {
  const auto size = static_cast<Py_ssize_t>(owners.size());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* value = PyObject_GetAttr(PyTuple_GET_ITEM(owners.ptr(), i), PyTuple_GET_ITEM(names.ptr(), i));
    if (value == nullptr) {  // deleted
      PyErr_Clear();
      return i;
    }
    const bool same = value == PyTuple_GET_ITEM(values.ptr(), i);
    Py_DECREF(value);
    if (!same) return i;
  }
  return at::impl::PythonTorchFunctionTLS::stack_len() > 0 ? -2 : -1;
}

}  // namespace resnorm
