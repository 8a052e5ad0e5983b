// SPDX-License-Identifier: BSD-3-Clause
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../../engine/encode.h"
#include "../../engine/layer_cache.h"
#include "../encode_composite.h"

namespace resnorm {

namespace {

// Where the tokens of a packed batch come from.
struct Packing {
  Tensor bounds;   // int32 (batch + 1,), of the sequences
  Tensor indices;  // int64 (tokens,), in the flattened batch
  bool computes_padding = false;
};

Packing packing_of(const Tensor& key_mask, Padding padding) {
  const auto batch = key_mask.size(0), length = key_mask.size(1);
  const auto mask = key_mask.contiguous();
  const auto* seen = mask.const_data_ptr<bool>();
  Packing packing{at::empty({batch + 1}, at::kInt),
                  at::empty({std::count(seen, seen + batch * length, true)}, at::kLong)};
  auto* const bounds = packing.bounds.mutable_data_ptr<int32_t>();
  auto* const indices = packing.indices.mutable_data_ptr<int64_t>();
  int64_t tokens = 0;
  for (int64_t i = 0; i < batch; ++i, seen += length) {
    bounds[i] = static_cast<int32_t>(tokens);
    for (int64_t j = 0; j < length; ++j) {
      if (seen[j]) indices[tokens++] = i * length + j;
    }
    const auto real = tokens - bounds[i];
    packing.computes_padding =
        packing.computes_padding || (padding == Padding::kSkipUnlessFirst && !seen[0]) ||
        (padding == Padding::kSkipIfTrailing && !std::all_of(seen, seen + real, std::identity()));
  }
  bounds[batch] = static_cast<int32_t>(tokens);
  return packing;
}

Tensor equal_bounds(int64_t batch, int64_t length) {
  auto bounds = at::empty({batch + 1}, at::kInt);
  auto* const bound = bounds.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i <= batch; ++i) bound[i] = static_cast<int32_t>(i * length);
  return bounds;
}

Tensor encode_cpu(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                  int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                  bool norm_first, bool causal, c10::string_view padding, std::optional<at::ScalarType> product_dtype) {
  const auto call = encode_call(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation, norm_first,
                                causal, padding);
  if (input.numel() == 0) return at::empty_like(input, at::MemoryFormat::Contiguous);
  const auto positions = input.flatten(0, 1);
  std::optional<Packing> packing;
  if (key_mask.has_value()) packing = packing_of(*key_mask, call.padding);
  const auto is_padded = packing.has_value() && packing->indices.size(0) < positions.size(0);
  if (is_padded && packing->computes_padding) return composite::encode(call);
  std::vector<c10::Storage> memory;  // of the parameters, whatever other threads assign to them meanwhile
  for (const OptionalTensor& each : parameters) {
    if (each.has_value()) memory.push_back(each->storage());
  }
  const auto layers = engine::cached_layers(parameters, num_layers, call.options, product_dtype);
  const auto tokens = is_padded ? positions.index_select(0, packing->indices) : positions;
  const auto bounds = is_padded ? packing->bounds : equal_bounds(input.size(0), input.size(1));
  const auto output = engine::encode(tokens.resolve_neg().to(layers->precision.stream), bounds, layers->layers,
                                     norm_first, causal, engine::kMaxRows)
                          .to(input.scalar_type());
  if (!is_padded) return output.view(input.sizes());
  auto padded = at::zeros(positions.sizes(), input.options());
  return padded.index_copy_(0, packing->indices, output).view(input.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("encode", encode_cpu); }

}  // namespace resnorm
