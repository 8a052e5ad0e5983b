// SPDX-License-Identifier: BSD-3-Clause
#include "packing.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <functional>

namespace resnorm::engine {

Packing packing_of(const OptionalTensor& key_mask, int64_t batch, int64_t length) {
  Packing packing;
  packing.bounds = at::empty({batch + 1}, at::kInt);
  auto* const bounds = packing.bounds.mutable_data_ptr<int32_t>();
  // A copy, which no other thread writes: it is read twice.
  const auto mask = key_mask.has_value() ? key_mask->clone(at::MemoryFormat::Contiguous) : Tensor();
  const auto* seen = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  const auto count = seen == nullptr ? batch * length : std::count(seen, seen + batch * length, true);
  if (count == batch * length) {
    for (int64_t i = 0; i <= batch; ++i) bounds[i] = static_cast<int32_t>(i * length);
    return packing;
  }
  packing.indices = at::empty({count}, at::kLong);
  auto* const indices = packing.indices.mutable_data_ptr<int64_t>();
  int64_t tokens = 0;
  for (int64_t i = 0; i < batch; ++i, seen += length) {
    bounds[i] = static_cast<int32_t>(tokens);
    for (int64_t j = 0; j < length; ++j) {
      if (seen[j]) indices[tokens++] = i * length + j;
    }
    const auto real = tokens - bounds[i];
    packing.hides_first = packing.hides_first || !seen[0];
    packing.is_trailing = packing.is_trailing && std::all_of(seen, seen + real, std::identity());
  }
  bounds[batch] = static_cast<int32_t>(tokens);
  return packing;
}

Tensor pack(const Tensor& positions, const Packing& packing) {
  return packing.has_padding() ? positions.index_select(0, packing.indices) : positions;
}

Tensor unpack(const Tensor& tokens, const Packing& packing, int64_t positions) {
  if (!packing.has_padding()) return tokens;
  return at::zeros({positions, tokens.size(1)}, tokens.options()).index_copy_(0, packing.indices, tokens);
}

}  // namespace resnorm::engine
