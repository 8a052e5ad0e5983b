// SPDX-License-Identifier: BSD-3-Clause
// Long packed batches in chunks of whole sequences: sequences do not see each other, and everything that is written for
// a chunk stays in the caches and in memory that the process already has.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace resnorm::engine {

struct Chunk {
  at::Tensor tokens;      // (tokens, dim)
  at::Tensor cu_seqlens;  // of these tokens
  at::Tensor output;      // (tokens, dim), to be written
};

// What `run` writes for all of `tokens`, (tokens, dim) on the CPU, which are not written.
//
// A chunk has as many sequences as have `max_rows` tokens at most, or one that is longer. It may have a last sequence
// of zeros, which makes up `padded_rows(rows)`. Throws where `cu_seqlens` are not the bounds of the tokens.
at::Tensor in_chunks(const at::Tensor& tokens, const at::Tensor& cu_seqlens, int64_t max_rows,
                     const std::function<int64_t(int64_t)>& padded_rows, const std::function<void(const Chunk&)>& run);

}  // namespace resnorm::engine
