// SPDX-License-Identifier: BSD-3-Clause
// One row of residual + dropout(input + input_bias), vector by vector.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class Input, class Residual, class Acc, bool kHasBias, bool kHasDropout>
struct ResidualSum {
  const Input* input;
  const Residual* residual;
  const Acc* bias;
  const std::uint16_t* draws;
  std::uint32_t threshold;
  Acc scale;

  template <class Lanes>
  RESNORM_INLINE Vec<Acc> operator()(std::int64_t i, Lanes lanes) const {
    using V = Vec<Acc>;
    V branch = V::load(input + i, lanes);
    if constexpr (kHasBias) branch = branch + V::load(bias + i, lanes);
    if constexpr (kHasDropout) branch = (branch * V::broadcast(scale)).keep(draws + i, threshold);
    return V::load(residual + i, lanes) + branch;
  }
};

// Reads the operands that add_layer_norm and residual_add have in common.
template <class Input, class Residual, class Acc>
class ResidualSumRows {
 public:
  template <class Arguments>
  ResidualSumRows(const Arguments& a, RowBuffers& buffers)
      : input_(a.input, a.cols, buffers),
        residual_(a.residual, a.cols, buffers),
        dropout_(a.dropout, a.dropout.threshold > 0 ? a.cols : 0, buffers),
        has_bias_(a.input_bias.data != nullptr) {
    if (has_bias_ || dropout_.threshold > 0) bias_ = vector_or(a.input_bias, Acc(0), a.cols, buffers);
  }

  // f(ResidualSum) for one row. Beside the draws, adding a bias of zeros costs nothing worth a loop of its own.
  template <class F>
  RESNORM_INLINE auto with_row(std::int64_t row, const F& f) const {
    if (dropout_.threshold > 0) return f(sum<true, true>(row, dropout_.row(row)));
    if (has_bias_) return f(sum<true, false>(row, nullptr));
    return f(sum<false, false>(row, nullptr));
  }

  RESNORM_INLINE const Input* input_ahead(std::int64_t row) const { return input_.ahead(row); }
  RESNORM_INLINE const Residual* residual_ahead(std::int64_t row) const { return residual_.ahead(row); }

 private:
  template <bool kHasBias, bool kHasDropout>
  RESNORM_INLINE ResidualSum<Input, Residual, Acc, kHasBias, kHasDropout> sum(std::int64_t row,
                                                                              const std::uint16_t* draws) const {
    return {input_.row(row), residual_.row(row), bias_, draws, dropout_.threshold, static_cast<Acc>(dropout_.scale)};
  }

  RowReader<Input> input_;
  RowReader<Residual> residual_;
  DropoutRows dropout_;
  bool has_bias_;
  const Acc* bias_ = nullptr;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
