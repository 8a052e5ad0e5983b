// SPDX-License-Identifier: BSD-3-Clause
// Rows of residual + dropout(input + input_bias), vector by vector.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// A group of rows: (k, i, lanes) is a vector of the k-th.
template <class Input, class Residual, class Acc, int kRows, bool kHasBias, bool kHasDropout>
struct ResidualSums {
  const Input* input[kRows];
  const Residual* residual[kRows];
  const std::uint16_t* draws[kRows];
  const Acc* bias;
  std::uint32_t threshold;
  Acc scale;

  template <int k, class Lanes>
  RESNORM_INLINE Vec<Acc> operator()(Index<k>, std::int64_t i, Lanes lanes) const {
    using V = Vec<Acc>;
    V branch = V::load(input[k] + i, lanes);
    if constexpr (kHasBias) branch = branch + V::load(bias + i, lanes);
    if constexpr (kHasDropout) branch = (branch * V::broadcast(scale)).keep(draws[k] + i, threshold);
    return V::load(residual[k] + i, lanes) + branch;
  }
};

// What comes after a group of rows, to be prefetched.
template <class Input, class Residual, int kRows>
struct NextResidualRows {
  const Input* input[kRows];
  const Residual* residual[kRows];
};

// Reads the operands that the norms of a sum and residual_add have in common.
template <class Input, class Residual, class Acc>
class ResidualSumRows {
 public:
  template <class Arguments>
  ResidualSumRows(const Arguments& a, RowBuffers& buffers)
      : input_(a.input, a.cols, buffers, kRowsPerGroup),
        residual_(a.residual, a.cols, buffers, kRowsPerGroup),
        dropout_(a.dropout, a.dropout.threshold > 0 ? a.cols : 0, buffers, kRowsPerGroup),
        has_bias_(a.input_bias.data != nullptr) {
    if (has_bias_ || dropout_.threshold > 0) bias_ = vector_or(a.input_bias, Acc(0), a.cols, buffers);
  }

  // f(ResidualSums) for kRows rows from the first on. Beside the draws, adding a bias of zeros costs nothing worth a
  // loop of its own.
  template <int kRows, class F>
  RESNORM_INLINE void with_rows(std::int64_t first, const F& f) const {
    if (dropout_.threshold > 0) return f(sums<kRows, true, true>(first));
    if (has_bias_) return f(sums<kRows, true, false>(first));
    return f(sums<kRows, false, false>(first));
  }

  template <int kRows>
  RESNORM_INLINE NextResidualRows<Input, Residual, kRows> next(std::int64_t first) const {
    NextResidualRows<Input, Residual, kRows> next;
    for (int k = 0; k < kRows; ++k) {
      next.input[k] = input_.next(first + k, kRows);
      next.residual[k] = residual_.next(first + k, kRows);
    }
    return next;
  }

 private:
  template <int kRows, bool kHasBias, bool kHasDropout>
  RESNORM_INLINE auto sums(std::int64_t first) const {
    ResidualSums<Input, Residual, Acc, kRows, kHasBias, kHasDropout> sums;
    for (int k = 0; k < kRows; ++k) {
      sums.input[k] = input_.row(first + k, k);
      sums.residual[k] = residual_.row(first + k, k);
      sums.draws[k] = kHasDropout ? dropout_.row(first + k, k) : nullptr;
    }
    sums.bias = bias_;
    sums.threshold = dropout_.threshold;
    sums.scale = static_cast<Acc>(dropout_.scale);
    return sums;
  }

  RowReader<Input> input_;
  RowReader<Residual> residual_;
  DropoutRows dropout_;
  bool has_bias_;
  const Acc* bias_ = nullptr;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
