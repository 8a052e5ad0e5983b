// SPDX-License-Identifier: BSD-3-Clause
// Which backend multiplies: none is the fastest one on every CPU, so whoever has measured says it here.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "backend.h"

namespace resnorm::engine {

// ATen unless set_linear_backend or the environment (RESNORM_LINEAR=<name>, which wins) says another that can do it.
const LinearBackend& linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features);

// A linear layer as far as its speed depends on it.
struct LinearShape {
  at::ScalarType dtype;
  int64_t in_features, out_features;
};

// What to multiply in, for layers of these shapes, of one dtype: float32 where the CPU has no fast products of the
// half-precision one that they have. Measures first whatever has not been measured, by the function that
// set_measurement was given; without one nothing is known.
at::ScalarType fastest_product_dtype(const std::vector<LinearShape>& shapes);
using Measurement = std::function<at::ScalarType(const std::vector<LinearShape>&)>;
void set_measurement(Measurement measurement);

// For the whole process.
void set_linear_backend(at::ScalarType dtype, int64_t in_features, int64_t out_features, const LinearBackend& backend);

// ValueError for an unknown name.
const LinearBackend& linear_backend_named(const std::string& name);

// Names of those that multiply in `dtype` on this machine, ATen first.
std::vector<std::string> linear_backends(at::ScalarType dtype);

// What RESNORM_LINEAR says, empty where it says nothing. Anything but the names is a ValueError.
const std::string& linear_backend_override();

// The table.
extern const LinearBackend aten, onednn, prepacked;
extern const LinearBackend onednn_unpacked;  // not in it: onednn, of a weight as it is

// For a weight that is multiplied too seldom to be prepacked, where prepacked ones are best by another than ATen; ATen
// where oneDNN cannot, or would have to copy the weight.
const LinearBackend& unpacked_backend(const Tensor& weight);

// ATen, or oneDNN with the weight as it is, whichever is the faster one for this product, of an input that is not
// empty: measured at the first one of its shape, and of about as many rows, in the process. Weights that lie transposed
// are taken too. The environment decides first; under deterministic algorithms or a dispatch mode it is ATen.
const LinearBackend& fastest_unpacked_backend(const Tensor& input, const Tensor& weight);

}  // namespace resnorm::engine
