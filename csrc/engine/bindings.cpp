// SPDX-License-Identifier: BSD-3-Clause
#include "bindings.h"

#include <pybind11/functional.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "encode.h"
#include "layer_cache.h"
#include "linear/choice.h"
#include "text.h"

namespace resnorm::engine {

namespace py = pybind11;

namespace {

PreparedLinear prepared_linear(const Tensor& weight, const OptionalTensor& bias, const std::string& backend) {
  return {weight, bias, linear_backend_named(backend)};
}

Tensor call(const PreparedLinear& linear, const Tensor& input, c10::string_view activation) {
  return linear(input, parse_activation(activation));
}

PreparedLinear prepare_linear_of(std::vector<Tensor> weights, std::vector<OptionalTensor> biases, bool transposed,
                                 at::ScalarType dtype) {
  return prepare_linear({std::move(weights), std::move(biases)}, transposed, dtype);
}

std::shared_ptr<LayerWeights> prepare_layer_of(const std::vector<OptionalTensor>& parameters, int64_t head_dim,
                                               double scale, double attention_eps, double feed_forward_eps,
                                               c10::string_view activation, bool transposed, at::ScalarType products,
                                               at::ScalarType stream) {
  return prepare_layer(layer_parameters(parameters),
                       {head_dim, scale, attention_eps, feed_forward_eps, parse_activation(activation), transposed},
                       {products, stream});
}

using PythonShape = std::tuple<at::ScalarType, int64_t, int64_t>;

void set_python_measurement(const std::function<at::ScalarType(const std::vector<PythonShape>&)>& measurement) {
  set_measurement([measurement](const std::vector<LinearShape>& shapes) {
    std::vector<PythonShape> tuples;
    for (const auto& shape : shapes) tuples.emplace_back(shape.dtype, shape.in_features, shape.out_features);
    return measurement(tuples);
  });
}

std::string name_of_linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features) {
  return linear_backend(dtype, in_features, out_features).name;
}

void set_linear_backend_by_name(at::ScalarType dtype, int64_t in_features, int64_t out_features,
                                const std::string& name) {
  set_linear_backend(dtype, in_features, out_features, linear_backend_named(name));
}

// Detached, so that nothing that is kept refers to a parameter.
OptionalTensor detached(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->detach()) : std::nullopt;
}

TextWeights text_weights(const Tensor& words, const Tensor& positions, const Tensor& position_ids,
                         std::optional<int64_t> padding_id, const std::vector<std::pair<Tensor, OptionalTensor>>& types,
                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                         std::optional<PreparedLinear> projection, Layers layers, at::ScalarType stream,
                         std::optional<PreparedLinear> pooler) {
  TextWeights weights{words.detach(),
                      positions.detach(),
                      position_ids.detach(),
                      padding_id,
                      {},
                      {detached(norm_weight), detached(norm_bias), eps},
                      std::move(projection),
                      std::move(layers),
                      stream,
                      std::move(pooler)};
  for (const auto& [weight, ids] : types) weights.types.push_back({weight.detach(), detached(ids)});
  return weights;
}

std::optional<std::pair<Tensor, OptionalTensor>> encode_text_to_pair(const TextWeights& weights, const Tensor& ids,
                                                                     const OptionalTensor& mask,
                                                                     const OptionalTensor& type_ids,
                                                                     bool skip_padding) {
  auto output = encode_text(weights, ids, mask, type_ids, skip_padding);
  if (!output.has_value()) return std::nullopt;
  return {{std::move(output->hidden), std::move(output->pooled)}};
}

}  // namespace

void bind(py::module_& m) {
  py::class_<PreparedLinear>(m, "PreparedLinear")
      .def(py::init(torch::wrap_pybind_function_no_gil(prepared_linear)), py::arg("weight"), py::arg("bias"),
           py::arg("backend"))
      .def("__call__", torch::wrap_pybind_function_no_gil(call), py::arg("x"), py::arg("activation") = "none")
      .def_readonly("weight", &PreparedLinear::weight)
      .def_property_readonly("backend", [](const PreparedLinear& linear) { return linear.backend->name; });
  py::class_<LayerWeights, std::shared_ptr<LayerWeights>>(m, "LayerWeights")
      .def_readonly("qkv", &LayerWeights::qkv)
      .def_readonly("attention_output", &LayerWeights::attention_output)
      .def_readonly("intermediate", &LayerWeights::intermediate)
      .def_readonly("output", &LayerWeights::output);
  m.def("prepare_linear", torch::wrap_pybind_function_no_gil(prepare_linear_of));
  m.def("prepare_layer", torch::wrap_pybind_function_no_gil(prepare_layer_of), py::arg("parameters"),
        py::arg("head_dim"), py::arg("scale"), py::arg("attention_eps"), py::arg("feed_forward_eps"),
        py::arg("activation"), py::kw_only(), py::arg("transposed") = false, py::arg("products"), py::arg("stream"));
  m.def("linear_backend", torch::wrap_pybind_function(name_of_linear_backend));
  m.def("set_linear_backend", torch::wrap_pybind_function(set_linear_backend_by_name));
  m.def("linear_backends", torch::wrap_pybind_function(linear_backends));
  m.def("linear_backend_override", torch::wrap_pybind_function(linear_backend_override));
  m.def("set_linear_measurement", torch::wrap_pybind_function(set_python_measurement));
  m.def("clear_layer_cache", torch::wrap_pybind_function_no_gil(clear_layer_cache));
  m.attr("MAX_ROWS") = kMaxRows;
  m.def("encode", torch::wrap_pybind_function_no_gil(encode));
  py::class_<TextWeights>(m, "TextWeights")
      .def(py::init(torch::wrap_pybind_function(text_weights)), py::kw_only(), py::arg("words"), py::arg("positions"),
           py::arg("position_ids"), py::arg("padding_id"), py::arg("types"), py::arg("norm_weight"),
           py::arg("norm_bias"), py::arg("eps"), py::arg("projection"), py::arg("layers"), py::arg("stream"),
           py::arg("pooler"));
  m.def("encode_text", torch::wrap_pybind_function_no_gil(encode_text_to_pair));
  m.def("pre_norm_layer", torch::wrap_pybind_function_no_gil(pre_norm_layer));
}

}  // namespace resnorm::engine
