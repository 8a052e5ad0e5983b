// SPDX-License-Identifier: BSD-3-Clause
// The module resnorm_ext._C: eager entry points into the operators, and what this library was built with.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#ifdef RESNORM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "data_writes.h"
#include "engine/bindings.h"
#include "kernels/cpu/dispatch.h"
#include "module_state.h"
#include "ops/bias_activation.h"
#include "ops/cpu/cpu_kernels.h"
#include "ops/cpu/weight_fingerprint.h"
#include "ops/feed_forward.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/packed_attention.h"
#include "ops/residual_add.h"
#include "ops/support/kernel_plan.h"
#include "python_shape.h"

namespace py = pybind11;

namespace resnorm {
namespace {

// What the compiler saw, whatever it had been told.
py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpp_standard"] = __cplusplus;
#ifdef RESNORM_WITH_CUDA
  info["cuda"] = CUDART_VERSION;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

py::dict kernel_plan_for_python(const std::string& pass, int64_t cols, at::ScalarType dtype,
                                std::optional<at::ScalarType> residual_dtype, bool dropout, bool aligned,
                                int architecture) {
  const auto plan = kernel_plan(pass, cols, dtype, residual_dtype, dropout, aligned, architecture);
  py::dict result;
  result["generic"] = plan.generic;
  result["shifted"] = plan.shifted;
  result["row_threads"] = plan.row_threads;
  result["vectors_per_thread"] = plan.items;
  result["threads"] = plan.threads;
  result["cluster"] = plan.cluster;
  result["tiles"] = plan.tiles;
  result["description"] = describe(plan);
  return result;
}

std::string cpu_isa() { return cpu_kernels().isa; }

}  // namespace
}  // namespace resnorm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using resnorm::with_python_shapes;
  resnorm::note_data_aliases();
  // no_gil: other Python threads run while an operator does. The wrapper also turns torch's C++ errors into its Python
  // ones.
  const auto define_norm = [&](const char* name, auto* function) {
    m.def(name, torch::wrap_pybind_function_no_gil(with_python_shapes(function)));
  };
  define_norm("layer_norm", resnorm::layer_norm);
  define_norm("layer_norm_out", resnorm::layer_norm_out);
  define_norm("rms_norm", resnorm::rms_norm);
  define_norm("rms_norm_out", resnorm::rms_norm_out);
  define_norm("add_layer_norm", resnorm::add_layer_norm);
  define_norm("add_layer_norm_out", resnorm::add_layer_norm_out);
  define_norm("add_rms_norm", resnorm::add_rms_norm);
  define_norm("add_rms_norm_out", resnorm::add_rms_norm_out);
  m.def("residual_add", torch::wrap_pybind_function_no_gil(resnorm::residual_add));
  m.def("residual_add_out", torch::wrap_pybind_function_no_gil(resnorm::residual_add_out));
  m.def("bias_activation", torch::wrap_pybind_function_no_gil(resnorm::bias_activation));
  m.def("bias_activation_out", torch::wrap_pybind_function_no_gil(resnorm::bias_activation_out));
  m.def("linear", torch::wrap_pybind_function_no_gil(resnorm::linear));
  m.def("feed_forward", torch::wrap_pybind_function_no_gil(resnorm::feed_forward));
  m.def("packed_attention", torch::wrap_pybind_function_no_gil(resnorm::packed_attention));
  m.def("weight_fingerprint", torch::wrap_pybind_function(resnorm::weight_fingerprint));
  resnorm::engine::bind(m);
  m.def("module_state", resnorm::module_state);
  m.def("has_module_state", resnorm::has_module_state);
  m.def("first_changed", resnorm::first_changed);
  py::class_<resnorm::DataWatch>(m, "DataWatch")
      .def(py::init<const std::vector<at::Tensor>&>())
      .def("writes", &resnorm::DataWatch::writes);
  m.def("any_requires_grad", [](const std::vector<at::Tensor>& tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
  });
  m.def("kernel_plan", torch::wrap_pybind_function(resnorm::kernel_plan_for_python), py::arg("kernel"),
        py::arg("columns"), py::arg("dtype"), py::kw_only(), py::arg("residual_dtype") = py::none(),
        py::arg("dropout") = false, py::arg("aligned") = true, py::arg("architecture") = 90);
  m.def("free_workspaces", torch::wrap_pybind_function_no_gil(resnorm::free_workspaces));
  m.def("build_info", resnorm::build_info);
  m.def("cpu_isa", torch::wrap_pybind_function(resnorm::cpu_isa));
  m.def("supported_cpu_isas", resnorm::cpu::supported_isas);
}
