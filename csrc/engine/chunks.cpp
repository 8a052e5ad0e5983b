// SPDX-License-Identifier: BSD-3-Clause
#include "chunks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../ops/packed_attention_composite.h"

namespace resnorm::engine {

namespace {

using at::Tensor;

// The bounds of sequences that lie between two of `bounds`, from 0 on, and then `rows`.
Tensor bounds_between(const int32_t* first, const int32_t* last, int64_t rows) {
  const auto count = last - first + 1;
  const bool padded = *last - *first < rows;
  auto result = at::empty({count + padded}, at::TensorOptions().dtype(at::kInt));
  auto* to = result.mutable_data_ptr<int32_t>();
  std::transform(first, last + 1, to, [&](int32_t bound) { return bound - *first; });
  if (padded) to[count] = static_cast<int32_t>(rows);
  return result;
}

}  // namespace

Tensor in_chunks(const Tensor& tokens, const Tensor& cu_seqlens, int64_t max_rows,
                 const std::function<int64_t(int64_t)>& padded_rows, const std::function<void(const Chunk&)>& run) {
  check_cu_seqlens(cu_seqlens);
  const auto bounds = composite::bounds_of(cu_seqlens, tokens.size(0), std::nullopt);
  auto output = at::empty_like(tokens, at::MemoryFormat::Contiguous);
  const auto* first = bounds.const_data_ptr<int32_t>();
  const auto* const end = first + bounds.numel() - 1;
  while (first < end) {
    const auto* last = std::upper_bound(first, end + 1, static_cast<int64_t>(*first) + max_rows) - 1;
    last = std::max(last, first + 1);
    const int64_t rows = *last - *first, padded = padded_rows(rows);
    auto x = tokens.narrow(0, *first, rows), y = output.narrow(0, *first, rows);
    if (padded == rows) {
      if (rows > 0) run({x, bounds_between(first, last, rows), y});
    } else {
      auto longer = at::zeros({padded, tokens.size(1)}, tokens.options());
      longer.narrow(0, 0, rows).copy_(x);
      auto result = at::empty_like(longer);
      run({longer, bounds_between(first, last, padded), result});
      y.copy_(result.narrow(0, 0, rows));
    }
    first = last;
  }
  return output;
}

}  // namespace resnorm::engine
