// SPDX-License-Identifier: BSD-3-Clause
#include "philox.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "../../kernels/philox.h"
#include "dropout.h"

namespace resnorm::composite {

namespace {

// 32-bit words live in int64 tensors: their products wrap as unsigned ones do, and masking recovers both halves.
Tensor low_word(const Tensor& value) { return value.bitwise_and(0xFFFFFFFFLL); }
Tensor high_word(const Tensor& value) { return low_word(value.__rshift__(32)); }

// The eight draws of each counter, in a last dimension.
Tensor draws_of(const Tensor& counter, const Tensor& seed) {
  auto c0 = low_word(counter), c1 = high_word(counter);
  auto c2 = at::zeros_like(counter), c3 = c2;
  auto k0 = low_word(seed), k1 = high_word(seed);
  for (int round = 0; round < philox::kRounds; ++round) {
    const auto product0 = c0 * static_cast<int64_t>(philox::kMultiplier0);
    const auto product1 = c2 * static_cast<int64_t>(philox::kMultiplier1);
    const auto next0 = high_word(product1).bitwise_xor(c1).bitwise_xor(k0);
    const auto next2 = high_word(product0).bitwise_xor(c3).bitwise_xor(k1);
    c1 = low_word(product1);
    c3 = low_word(product0);
    c0 = next0;
    c2 = next2;
    k0 = low_word(k0 + static_cast<int64_t>(philox::kKeyIncrement0));
    k1 = low_word(k1 + static_cast<int64_t>(philox::kKeyIncrement1));
  }
  std::vector<Tensor> draws;
  for (const auto& word : {c0, c1, c2, c3}) {
    draws.push_back(word.bitwise_and(0xFFFF));
    draws.push_back(word.__rshift__(16));
  }
  return at::stack(draws, -1);
}

Tensor keep_mask(c10::SymIntArrayRef sizes, std::uint32_t threshold, const Tensor& seed) {
  c10::SymInt numel = 1;
  for (const auto& size : sizes) numel *= size;
  const auto blocks = (numel + (philox::kElementsPerBlock - 1)) / philox::kElementsPerBlock;
  const auto draws = draws_of(at::arange(at::Scalar(blocks), seed.options()), seed);
  return draws.flatten().narrow_symint(0, 0, numel).reshape_symint(sizes).ge(static_cast<int64_t>(threshold));
}

}  // namespace

Tensor keep_mask(const Tensor& row, const Tensor& col, int64_t cols, double p, const Tensor& seed) {
  const auto block = at::floor_divide(col, philox::kElementsPerBlock);
  const auto draws = draws_of(row * (cols / philox::kElementsPerBlock) + block, seed);
  const auto place =
      (col - block * philox::kElementsPerBlock).expand_symint(draws.sym_sizes().slice(0, draws.dim() - 1));
  return draws.gather(-1, place.unsqueeze(-1)).squeeze(-1).ge(static_cast<int64_t>(dropout_threshold(p)));
}

Tensor dropout(const Tensor& values, double p, const OptionalTensor& seed) {
  const auto threshold = dropout_threshold(p);
  if (threshold == 0) return values;
  const auto keep = keep_mask(values.sym_sizes(), threshold, *seed);
  return at::where(keep, values * dropout_scale(threshold), 0.0);
}

}  // namespace resnorm::composite
