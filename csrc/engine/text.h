// SPDX-License-Identifier: BSD-3-Clause
// A text encoder (BERT, Devlin et al. 2019) from ids to its output in one call: on short texts what lies around the
// layers takes as long as they do.
#pragma once

#include "layer_weights.h"

namespace resnorm::engine {

struct TypeEmbeddings {
  Tensor weight;               // (ids, dim)
  OptionalTensor default_ids;  // int64 (1, positions), those of a call that gives none; zeros if absent
};

struct TextWeights {
  Tensor words, positions;            // the embeddings' weights, (ids, dim)
  Tensor position_ids;                // integral (1, positions), of the first, second, ... of a sequence
  std::optional<int64_t> padding_id;  // if there is one, positions are others: the i-th of the ids that are not
                                      // padding_id, counted from 1, has padding_id + i, and the rest padding_id
  std::vector<TypeEmbeddings> types;  // a call may give the ids of the first one
  Norm norm;
  std::optional<PreparedLinear> projection;  // from embeddings to layers
  Layers layers;
  at::ScalarType stream;                 // dtype of what goes through the layers
  std::optional<PreparedLinear> pooler;  // of the first position; tanh follows
};

struct TextOutput {
  Tensor hidden;          // (batch, length, dim)
  OptionalTensor pooled;  // (batch, dim)
};

// The output for `ids`, an integral (batch, length), at the positions where `mask` is not zero, of that shape, and
// zeros elsewhere. None where the encoder has not enough positions, or where padding would have to be computed:
// any if not `skip_padding`, and a sequence's first position, which poolers and heads read.
//
// IndexError for ids that a table does not have. Without grad, on the CPU.
std::optional<TextOutput> encode_text(const TextWeights& weights, const Tensor& ids, const OptionalTensor& mask,
                                      const OptionalTensor& type_ids, bool skip_padding);

}  // namespace resnorm::engine
