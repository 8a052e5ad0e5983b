// SPDX-License-Identifier: BSD-3-Clause
#include "text.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/zeros_like.h>

#include <array>

#include "../ops/norm.h"
#include "encode.h"
#include "packing.h"

namespace resnorm::engine {

namespace {

// Of a batch's ids, those of its tokens, int64.
Tensor of_tokens(const Tensor& ids, const Packing& packing) { return pack(ids.reshape({-1}).to(at::kLong), packing); }

// The position of every token.
Tensor positions_of(const TextWeights& weights, const Tensor& ids, const Packing& packing) {
  if (!weights.padding_id.has_value()) {
    return of_tokens(weights.position_ids.slice(1, 0, ids.size(1)).expand_as(ids), packing);
  }
  const auto real = ids.ne(*weights.padding_id).to(at::kLong);
  return of_tokens(real.cumsum(1).mul_(real).add_(*weights.padding_id), packing);
}

Tensor embed(const TextWeights& weights, const Tensor& ids, const OptionalTensor& type_ids, const Packing& packing) {
  const auto positions = positions_of(weights, ids, packing);
  auto words = at::embedding(weights.words, of_tokens(ids, packing));
  for (std::size_t i = 0; i < weights.types.size(); ++i) {
    const auto& [weight, default_ids] = weights.types[i];
    const auto types = i == 0 && type_ids.has_value() ? of_tokens(*type_ids, packing)
                       : default_ids.has_value()      ? default_ids->select(0, 0).index_select(0, positions)
                                                      : at::zeros_like(positions);
    words.add_(at::embedding(weight, types));
  }
  const auto tokens = at::embedding(weights.positions, positions);
  const std::array<c10::SymInt, 1> shape{tokens.size(1)};
  add_layer_norm_out(tokens, words, shape, weights.norm.weight, weights.norm.bias, weights.norm.eps, std::nullopt, 0.0,
                     std::nullopt, std::nullopt, tokens, std::nullopt);
  return tokens;
}

}  // namespace

std::optional<TextOutput> encode_text(const TextWeights& weights, const Tensor& ids, const OptionalTensor& mask,
                                      const OptionalTensor& type_ids, bool skip_padding) {
  const at::AutoDispatchBelowADInplaceOrView guard;  // what is returned is nobody's view
  const auto batch = ids.size(0), length = ids.size(1);
  const auto first_position = weights.padding_id.has_value() ? *weights.padding_id + 1 : 0;
  if (first_position + length > weights.position_ids.size(1)) return std::nullopt;
  const auto key_mask = mask.has_value() ? OptionalTensor(mask->to(at::kBool)) : std::nullopt;
  const auto packing = packing_of(key_mask, batch, length);
  if (packing.has_padding() && (packing.hides_first || !skip_padding)) return std::nullopt;
  const auto dtype = weights.words.scalar_type();
  auto tokens = embed(weights, ids, type_ids, packing);
  if (weights.projection.has_value()) tokens = (*weights.projection)(tokens);
  const auto output = encode(tokens.to(weights.stream), packing.bounds, weights.layers, /*norm_first=*/false,
                             /*causal=*/false, kMaxRows);
  TextOutput result{unpack(output.to(dtype), packing, batch * length).view({batch, length, -1}), std::nullopt};
  if (weights.pooler.has_value()) {
    const auto first = result.hidden.select(1, 0).to(weights.pooler->weight.scalar_type()).contiguous();
    result.pooled = (*weights.pooler)(first).tanh_().to(dtype);
  }
  return result;
}

}  // namespace resnorm::engine
