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
template <class Input, class Residual, class Acc, bool kHasBias, bool kHasDropout>
class ResidualSumRows {
 public:
  template <class Arguments>
  ResidualSumRows(const Arguments& a, RowBuffers& buffers)
      : input_(a.input, a.cols, buffers),
        residual_(a.residual, a.cols, buffers),
        dropout_(a.dropout, kHasDropout ? a.cols : 0, buffers),
        bias_(kHasBias ? vector_or(a.input_bias, Acc(0), a.cols, buffers) : nullptr) {}

  RESNORM_INLINE ResidualSum<Input, Residual, Acc, kHasBias, kHasDropout> row(std::int64_t row) const {
    return {input_.row(row),    residual_.row(row),
            bias_,              kHasDropout ? dropout_.row(row) : nullptr,
            dropout_.threshold, static_cast<Acc>(dropout_.scale)};
  }

  RESNORM_INLINE const Input* input_ahead(std::int64_t row) const { return input_.ahead(row); }
  RESNORM_INLINE const Residual* residual_ahead(std::int64_t row) const { return residual_.ahead(row); }

 private:
  RowReader<Input> input_;
  RowReader<Residual> residual_;
  DropoutRows dropout_;
  const Acc* bias_;
};

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// f(Flag has_bias, Flag has_dropout)
template <class Arguments, class F>
inline void with_branch_flags(const Arguments& a, const F& f) {
  const bool bias = a.input_bias.data != nullptr, dropout = a.dropout.threshold > 0;
  if (bias) {
    dropout ? f(Flag<true>{}, Flag<true>{}) : f(Flag<true>{}, Flag<false>{});
  } else {
    dropout ? f(Flag<false>{}, Flag<true>{}) : f(Flag<false>{}, Flag<false>{});
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
