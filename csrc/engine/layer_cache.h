// SPDX-License-Identifier: BSD-3-Clause
// Layers that an operator has prepared, kept for its next call with the same parameters.
#pragma once

#include "prepare.h"

namespace resnorm::engine {

// The layers of `parameters`, `layers` times as many tensors as one has, on the CPU; products in `product_dtype`, or
// where that is not given in what the chosen backends are fastest with.
//
// Kept until a parameter changes (data_writes.h, weight_fingerprint.h), or its memory is gone and any other call comes;
// a backend that is chosen later is not looked at. They may read the parameters' own memory, which the caller has to
// keep while it uses them.
struct CachedLayers {
  Layers layers;
  Precision precision;
};
std::shared_ptr<const CachedLayers> cached_layers(const c10::List<OptionalTensor>& parameters, int64_t layers,
                                                  const LayerOptions& options,
                                                  std::optional<at::ScalarType> product_dtype);

void clear_layer_cache();

}  // namespace resnorm::engine
