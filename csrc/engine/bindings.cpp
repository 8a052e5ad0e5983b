// SPDX-License-Identifier: BSD-3-Clause
#include "bindings.h"

#include <pybind11/functional.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "encode.h"

namespace resnorm::engine {

namespace py = pybind11;

namespace {

PreparedLinear prepared_linear(Tensor weight, OptionalTensor bias, const std::string& backend, int64_t out_features) {
  return {std::move(weight), std::move(bias), parse_linear_backend(backend), out_features};
}

Tensor call(const PreparedLinear& linear, const Tensor& input, c10::string_view activation) {
  return linear(input, activation);
}

}  // namespace

void bind(py::module_& m) {
  py::class_<PreparedLinear>(m, "PreparedLinear")
      .def(py::init(torch::wrap_pybind_function(prepared_linear)), py::arg("weight"), py::arg("bias"),
           py::arg("backend"), py::arg("out_features"))
      .def("__call__", torch::wrap_pybind_function_no_gil(call), py::arg("x"), py::arg("activation") = "none")
      .def_readonly("weight", &PreparedLinear::weight)
      .def_property_readonly("backend", [](const PreparedLinear& linear) { return name_of(linear.backend); });
  py::class_<Norm>(m, "Norm").def(py::init([](OptionalTensor weight, OptionalTensor bias, double eps) {
    return Norm{std::move(weight), std::move(bias), eps};
  }));
  py::class_<LayerWeights, std::shared_ptr<LayerWeights>>(m, "LayerWeights")
      .def(py::init([](int64_t num_heads, double scale, PreparedLinear qkv, PreparedLinear attention_output,
                       Norm attention_norm, PreparedLinear intermediate, std::string activation, PreparedLinear output,
                       Norm feed_forward_norm) {
             return std::make_shared<LayerWeights>(LayerWeights{
                 num_heads, scale, std::move(qkv), std::move(attention_output), std::move(attention_norm),
                 std::move(intermediate), std::move(activation), std::move(output), std::move(feed_forward_norm)});
           }),
           py::kw_only(), py::arg("num_heads"), py::arg("scale"), py::arg("qkv"), py::arg("attention_output"),
           py::arg("attention_norm"), py::arg("intermediate"), py::arg("activation"), py::arg("output"),
           py::arg("feed_forward_norm"))
      .def_readonly("qkv", &LayerWeights::qkv)
      .def_readonly("attention_output", &LayerWeights::attention_output)
      .def_readonly("intermediate", &LayerWeights::intermediate)
      .def_readonly("output", &LayerWeights::output);
  m.def("encode_post_norm", torch::wrap_pybind_function_no_gil(encode_post_norm));
  m.def("encode_pre_norm", torch::wrap_pybind_function_no_gil(encode_pre_norm));
  m.def("run_pre_norm", torch::wrap_pybind_function_no_gil(run_pre_norm));
}

}  // namespace resnorm::engine
