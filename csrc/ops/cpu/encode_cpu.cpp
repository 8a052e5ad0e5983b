// SPDX-License-Identifier: BSD-3-Clause
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../../engine/encode.h"
#include "../../engine/layer_cache.h"
#include "../../engine/packing.h"
#include "../encode_composite.h"

namespace resnorm {

namespace {

bool computes_padding(const engine::Packing& packing, Padding padding) {
  return packing.has_padding() && ((padding == Padding::kSkipUnlessFirst && packing.hides_first) ||
                                   (padding == Padding::kSkipIfTrailing && !packing.is_trailing));
}

Tensor encode_cpu(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                  int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                  bool norm_first, bool causal, c10::string_view padding, std::optional<at::ScalarType> product_dtype) {
  const auto call = encode_call(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation, norm_first,
                                causal, padding);
  if (input.numel() == 0) return at::empty_like(input, at::MemoryFormat::Contiguous);
  const auto packing = engine::packing_of(key_mask, input.size(0), input.size(1));
  if (computes_padding(packing, call.padding)) return composite::encode(call);
  std::vector<c10::Storage> memory;  // of the parameters, whatever other threads assign to them meanwhile
  for (const OptionalTensor& each : parameters) {
    if (each.has_value()) memory.push_back(each->storage());
  }
  const auto layers = engine::cached_layers(parameters, num_layers, call.options, product_dtype);
  const auto positions = input.flatten(0, 1);
  const auto tokens = engine::pack(positions, packing).resolve_neg().to(layers->precision.stream);
  const auto output = engine::encode(tokens, packing.bounds, layers->layers, norm_first, causal, engine::kMaxRows);
  return engine::unpack(output.to(input.scalar_type()), packing, positions.size(0)).view(input.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("encode", encode_cpu); }

}  // namespace resnorm
