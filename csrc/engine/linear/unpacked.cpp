// SPDX-License-Identifier: BSD-3-Clause
// Which backend multiplies weights as they are, as training does: they change at every step.
#include <ATen/Context.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "choice.h"

namespace resnorm::engine {

namespace {

// Dtype, input and output features, whether the weight lies transposed, and about how many rows there are.
using Shape = std::tuple<at::ScalarType, int64_t, int64_t, bool, uint64_t>;

// Of a batch; more would take longer and tell no more.
constexpr int64_t kMeasuredRows = 256;
constexpr int kMeasurements = 3;

double seconds_of(const LinearBackend& backend, const Tensor& input, const Tensor& weight) {
  const auto start = std::chrono::steady_clock::now();
  multiply(backend, input, weight, std::nullopt, Activation::kNone, weight.size(0));
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// In turns, so that a disturbance meets both; the first calls warm up.
const LinearBackend& faster(const Tensor& input, const Tensor& weight) {
  const auto matrix = input.reshape({-1, input.size(-1)});
  const auto rows = matrix.narrow(0, 0, std::min(matrix.size(0), kMeasuredRows));
  const LinearBackend* const backends[] = {&aten, &onednn_unpacked};
  double shortest[] = {seconds_of(aten, rows, weight), seconds_of(onednn_unpacked, rows, weight)};
  for (double& seconds : shortest) seconds = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kMeasurements; ++i) {
    for (int k = 0; k < 2; ++k) shortest[k] = std::min(shortest[k], seconds_of(*backends[k], rows, weight));
  }
  return *backends[shortest[1] < shortest[0]];
}

}  // namespace

const LinearBackend& fastest_unpacked_backend(const Tensor& input, const Tensor& weight) {
  const bool transposed = !weight.is_contiguous();
  const auto dtype = weight.scalar_type();
  if (weight.numel() == 0 || (transposed && !weight.t().is_contiguous()) || !onednn.supports(dtype)) return aten;
  if (const auto& name = linear_backend_override(); !name.empty()) return name == aten.name ? aten : onednn_unpacked;
  // Who counts or changes operators is to see those of the product, and no measurement.
  if (at::globalContext().deterministicAlgorithms() || c10::impl::TorchDispatchModeTLS::any_modes_set()) return aten;

  static std::mutex mutex;
  static std::map<Shape, const LinearBackend*> choices;
  const auto rows = std::bit_ceil(static_cast<uint64_t>(std::min(input.numel() / input.size(-1), kMeasuredRows)));
  const Shape shape{dtype, weight.size(1), weight.size(0), transposed, rows};
  {
    const std::lock_guard lock(mutex);
    if (const auto found = choices.find(shape); found != choices.end()) return *found->second;
  }
  const auto& choice = faster(input, weight);
  const std::lock_guard lock(mutex);
  return *choices.emplace(shape, &choice).first->second;
}

}  // namespace resnorm::engine
