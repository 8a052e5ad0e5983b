// SPDX-License-Identifier: BSD-3-Clause
#include "choice.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

namespace resnorm::engine {

namespace {

constexpr std::array kBackends = {&aten, &onednn, &prepacked};

using Shape = std::tuple<at::ScalarType, int64_t, int64_t>;

std::shared_mutex mutex;

std::map<Shape, const LinearBackend*>& choices() {
  static std::map<Shape, const LinearBackend*> map;
  return map;
}

// Never destroyed: it may be Python's, which is gone earlier.
Measurement& measurement() {
  static auto* const function = new Measurement;
  return *function;
}

const LinearBackend& chosen(const Shape& shape) {
  const std::shared_lock lock(mutex);
  const auto found = choices().find(shape);
  return found == choices().end() ? aten : *found->second;
}

const LinearBackend* find(const std::string& name) {
  const auto found = std::find_if(kBackends.begin(), kBackends.end(), [&](auto* each) { return each->name == name; });
  return found == kBackends.end() ? nullptr : *found;
}

// "aten, onednn or resnorm"
std::string names() {
  std::string text;
  for (const auto* backend : kBackends) {
    text += backend == kBackends.front() ? "" : backend == kBackends.back() ? " or " : ", ";
    text += backend->name;
  }
  return text;
}

}  // namespace

const LinearBackend& linear_backend_named(const std::string& name) {
  const auto* backend = find(name);
  TORCH_CHECK_VALUE(backend != nullptr, "Expected ", names(), " as the backend of linear layers, but got ", name);
  return *backend;
}

std::vector<std::string> linear_backends(at::ScalarType dtype) {
  std::vector<std::string> supporting;
  for (const auto* backend : kBackends) {
    if (backend->supports(dtype)) supporting.emplace_back(backend->name);
  }
  return supporting;
}

const std::string& linear_backend_override() {
  static const std::string value = [] {
    const char* text = std::getenv("RESNORM_LINEAR");
    const std::string name = text == nullptr ? "" : text;
    TORCH_CHECK_VALUE(name.empty() || find(name) != nullptr, "Expected RESNORM_LINEAR to be ", names(), ", but got ",
                      name);
    return name;
  }();
  return value;
}

const LinearBackend& linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features) {
  const auto& override = linear_backend_override();
  const auto& wanted = override.empty() ? chosen({dtype, in_features, out_features}) : linear_backend_named(override);
  return in_features > 0 && out_features > 0 && wanted.supports(dtype) ? wanted : aten;
}

const LinearBackend& unpacked_backend(const Tensor& weight) {
  const auto dtype = weight.scalar_type();
  const bool by_onednn = weight.numel() > 0 && weight.is_contiguous() && onednn.supports(dtype) &&
                         &linear_backend(dtype, weight.size(1), weight.size(0)) != &aten;
  return by_onednn ? onednn_unpacked : aten;
}

void set_measurement(Measurement function) { measurement() = std::move(function); }

at::ScalarType fastest_product_dtype(const std::vector<LinearShape>& shapes) {
  return measurement() ? measurement()(shapes) : shapes.front().dtype;
}

void set_linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features, const LinearBackend& backend) {
  const std::unique_lock lock(mutex);
  choices()[{dtype, in_features, out_features}] = &backend;
}

}  // namespace resnorm::engine
