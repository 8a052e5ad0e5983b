// SPDX-License-Identifier: BSD-3-Clause
// Shapes as torch's Python functions take them: a tuple or list of ints, or of whatever else has an __index__ (numpy's
// integers, tensors of no dimension).
#pragma once

#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_symnode.h>

#include <type_traits>

namespace resnorm {

struct PythonShape {
  c10::SmallVector<c10::SymInt, 4> sizes;

  operator c10::SymIntArrayRef() const { return sizes; }  // NOLINT: it stands for one
};

template <class T>
using FromPython = std::conditional_t<std::is_same_v<T, c10::SymIntArrayRef>, const PythonShape&, T>;

// `function`, whose shapes are taken from Python so.
template <class R, class... Args>
auto with_python_shapes(R (*function)(Args...)) {
  return [function](FromPython<Args>... args) -> R { return function(args...); };
}

}  // namespace resnorm

template <>
struct pybind11::detail::type_caster<resnorm::PythonShape> {
  PYBIND11_TYPE_CASTER(resnorm::PythonShape, const_name("Sequence[int]"));

  bool load(handle source, bool /*convert*/) {
    if (!PyTuple_Check(source.ptr()) && !PyList_Check(source.ptr())) return false;
    const auto size = PySequence_Fast_GET_SIZE(source.ptr());
    for (Py_ssize_t i = 0; i < size; ++i) {
      const handle item = PySequence_Fast_GET_ITEM(source.ptr(), i);
      if (torch::is_symint(item)) {
        value.sizes.push_back(item.cast<c10::SymInt>());
        continue;
      }
      const auto number = reinterpret_steal<object>(PyNumber_Index(item.ptr()));
      const auto length = number ? PyLong_AsLongLong(number.ptr()) : -1;
      if (PyErr_Occurred() != nullptr) {  // not an integer: pybind11 says which arguments it takes
        PyErr_Clear();
        return false;
      }
      value.sizes.emplace_back(static_cast<int64_t>(length));
    }
    return true;
  }
};
