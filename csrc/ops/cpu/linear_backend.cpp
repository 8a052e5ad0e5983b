// SPDX-License-Identifier: BSD-3-Clause
#include "linear_backend.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

#include "onednn_linear.h"
#include "prepacked_linear.h"

namespace resnorm {

namespace {

using Shape = std::tuple<at::ScalarType, int64_t, int64_t>;

std::shared_mutex mutex;

std::map<Shape, LinearBackend>& choices() {
  static std::map<Shape, LinearBackend> map;
  return map;
}

LinearBackend chosen(const Shape& shape) {
  const std::shared_lock lock(mutex);
  const auto found = choices().find(shape);
  return found == choices().end() ? LinearBackend::kAten : found->second;
}

}  // namespace

LinearBackend parse_linear_backend(const std::string& name) {
  for (const auto backend : {LinearBackend::kAten, LinearBackend::kOneDnn, LinearBackend::kResnorm}) {
    if (name == name_of(backend)) return backend;
  }
  TORCH_CHECK_VALUE(false, "Expected aten, onednn or resnorm as the backend of linear layers, but got ", name);
}

std::string name_of(LinearBackend backend) {
  switch (backend) {
    case LinearBackend::kAten:
      return "aten";
    case LinearBackend::kOneDnn:
      return "onednn";
    case LinearBackend::kResnorm:
      return "resnorm";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown backend");
}

const std::string& linear_backend_override() {
  static const std::string value = [] {
    const char* text = std::getenv("RESNORM_LINEAR");
    const std::string name = text == nullptr ? "" : text;
    TORCH_CHECK_VALUE(name.empty() || name == "aten" || name == "onednn" || name == "resnorm",
                      "Expected RESNORM_LINEAR to be aten, onednn or resnorm, but got ", name);
    return name;
  }();
  return value;
}

LinearBackend linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features) {
  const auto& override = linear_backend_override();
  const auto wanted = override.empty() ? chosen({dtype, in_features, out_features}) : parse_linear_backend(override);
  if (in_features == 0 || out_features == 0) return LinearBackend::kAten;
  const bool has_it = wanted == LinearBackend::kOneDnn    ? onednn::supports(dtype)
                      : wanted == LinearBackend::kResnorm ? prepacked_linear::supports(dtype)
                                                          : true;
  return has_it ? wanted : LinearBackend::kAten;
}

void set_linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features, LinearBackend backend) {
  const std::unique_lock lock(mutex);
  choices()[{dtype, in_features, out_features}] = backend;
}

}  // namespace resnorm
