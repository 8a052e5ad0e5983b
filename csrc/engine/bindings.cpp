// SPDX-License-Identifier: BSD-3-Clause
#include "bindings.h"

#include <pybind11/functional.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "encode.h"
#include "linear/choice.h"

namespace resnorm::engine {

namespace py = pybind11;

namespace {

PreparedLinear prepared_linear(const Tensor& weight, const OptionalTensor& bias, const std::string& backend) {
  return {weight, bias, linear_backend_named(backend)};
}

Tensor call(const PreparedLinear& linear, const Tensor& input, c10::string_view activation) {
  return linear(input, parse_activation(activation));
}

std::shared_ptr<LayerWeights> layer_weights(int64_t num_heads, double scale, PreparedLinear qkv,
                                            PreparedLinear attention_output, Norm attention_norm,
                                            PreparedLinear intermediate, c10::string_view activation,
                                            PreparedLinear output, Norm feed_forward_norm) {
  return std::make_shared<LayerWeights>(LayerWeights{
      num_heads, scale, std::move(qkv), std::move(attention_output), std::move(attention_norm), std::move(intermediate),
      parse_activation(activation), std::move(output), std::move(feed_forward_norm)});
}

std::string name_of_linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features) {
  return linear_backend(dtype, in_features, out_features).name;
}

void set_linear_backend_by_name(at::ScalarType dtype, int64_t in_features, int64_t out_features,
                                const std::string& name) {
  set_linear_backend(dtype, in_features, out_features, linear_backend_named(name));
}

}  // namespace

void bind(py::module_& m) {
  py::class_<PreparedLinear>(m, "PreparedLinear")
      .def(py::init(torch::wrap_pybind_function_no_gil(prepared_linear)), py::arg("weight"), py::arg("bias"),
           py::arg("backend"))
      .def("__call__", torch::wrap_pybind_function_no_gil(call), py::arg("x"), py::arg("activation") = "none")
      .def_readonly("weight", &PreparedLinear::weight)
      .def_property_readonly("backend", [](const PreparedLinear& linear) { return linear.backend->name; });
  py::class_<Norm>(m, "Norm").def(py::init([](OptionalTensor weight, OptionalTensor bias, double eps) {
    return Norm{std::move(weight), std::move(bias), eps};
  }));
  py::class_<LayerWeights, std::shared_ptr<LayerWeights>>(m, "LayerWeights")
      .def(py::init(torch::wrap_pybind_function(layer_weights)), py::kw_only(), py::arg("num_heads"), py::arg("scale"),
           py::arg("qkv"), py::arg("attention_output"), py::arg("attention_norm"), py::arg("intermediate"),
           py::arg("activation"), py::arg("output"), py::arg("feed_forward_norm"))
      .def_readonly("qkv", &LayerWeights::qkv)
      .def_readonly("attention_output", &LayerWeights::attention_output)
      .def_readonly("intermediate", &LayerWeights::intermediate)
      .def_readonly("output", &LayerWeights::output);
  m.def("linear_backend", torch::wrap_pybind_function(name_of_linear_backend));
  m.def("set_linear_backend", torch::wrap_pybind_function(set_linear_backend_by_name));
  m.def("linear_backends", torch::wrap_pybind_function(linear_backends));
  m.def("linear_backend_override", torch::wrap_pybind_function(linear_backend_override));
  m.def("encode", torch::wrap_pybind_function_no_gil(encode));
  m.def("pre_norm_layer", torch::wrap_pybind_function_no_gil(pre_norm_layer));
}

}  // namespace resnorm::engine
