// SPDX-License-Identifier: BSD-3-Clause
// Padded batches to their real tokens and back.
#pragma once

#include "../ops/support/checks.h"

namespace resnorm::engine {

// Where the tokens of a padded batch lie.
struct Packing {
  Tensor bounds;             // int32 (batch + 1,), of the sequences
  Tensor indices;            // int64 (tokens,), in the flattened batch; undefined where every position is a token
  bool hides_first = false;  // whether any sequence's first position is padding
  bool is_trailing = true;   // whether padding comes last in all of them

  bool has_padding() const { return indices.defined(); }
};

// Of a batch of (batch, length) positions; `key_mask`, bool of that shape, is true at tokens, everywhere if absent.
Packing packing_of(const OptionalTensor& key_mask, int64_t batch, int64_t length);

// The tokens of `positions`, (batch * length, dim).
Tensor pack(const Tensor& positions, const Packing& packing);

// (positions, dim), of which `tokens` are those that pack() takes, and all others zeros.
Tensor unpack(const Tensor& tokens, const Packing& packing, int64_t positions);

}  // namespace resnorm::engine
