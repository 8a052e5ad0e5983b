// SPDX-License-Identifier: BSD-3-Clause
// Mean and variance of a row in two sweeps, exact where one-sweep formulas are not: for rows far from zero.
//
// The first sweep sums differences from the row's first element, so the mean of a constant row is that element exactly.
// What rounding the mean loses, the second sweep finds again: with d = x - mean, delta = sum(d) / N is the rest of the
// mean, variance = sum(d^2) / N - delta^2, and x - mean - delta is the deviation, whatever the base.
#pragma once

#include <cstdint>

#include "prefetch.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

inline constexpr int kSlots = 4;

template <class Acc>
struct RowStatistics {
  Acc mean, delta, rstd;
};

// The mean of value(i, lanes) over a row. `sink(i, vector, lanes)` sees every vector once; the first element is read
// once more before, so `value` must have no effects.
template <class Acc, class Value, class Sink>
RESNORM_INLINE Acc row_mean(std::int64_t cols, double reciprocal_cols, const Value& value, const Sink& sink) {
  using V = Vec<Acc>;
  const Acc pivot = value(0, FirstLanes{1}).first();
  const V pivots = V::broadcast(pivot);
  V sums[kSlots] = {};
  for_each_vector<Acc, kSlots>(cols, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
    const V x = value(i, lanes);
    sink(i, x, lanes);
    sums[slot] = sums[slot] + (x - pivots).only(lanes);
  });
  return pivot + total(sums) * static_cast<Acc>(reciprocal_cols);
}

// What is left to know of a row when its mean is known to the last bit or so.
template <class Acc, int kNext>
RESNORM_INLINE RowStatistics<Acc> row_statistics(const Acc* row, std::int64_t cols, double reciprocal_cols, Acc mean,
                                                 double eps, const NextRows<kNext>& next) {
  using V = Vec<Acc>;
  const V means = V::broadcast(mean);
  double sum = 0.0, square = 0.0;
  for_each_piece(cols, [&](std::int64_t begin, std::int64_t size) RESNORM_INLINE_LAMBDA {
    V sums[kSlots] = {}, squares[kSlots] = {};
    for_each_vector<Acc, kSlots>(size, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      next.prefetch_column(begin + i);
      const V deviation = (V::load(row + begin + i, lanes) - means).only(lanes);
      sums[slot] = sums[slot] + deviation;
      squares[slot] = fma(deviation, deviation, squares[slot]);
    });
    sum += total(sums);
    square += total(squares);
  });
  // A handful of double operations a row, where float ones would leave the same relative error in every element. They
  // also keep rows of huge values from Inf - Inf.
  const double delta = sum * reciprocal_cols;
  const double variance = square * reciprocal_cols - delta * delta;
  // The mean takes what of delta it can hold: subtracting the little that is left then rounds no deviation once more.
  const Acc rounded_mean = static_cast<Acc>(mean + delta);
  return {rounded_mean, static_cast<Acc>((static_cast<double>(mean) - rounded_mean) + delta),
          static_cast<Acc>(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps))};
}

// output = (x - mean) * rstd * weight + bias.
template <class Acc, class Out>
RESNORM_NOINLINE void normalize_row(const Acc* row, std::int64_t cols, const RowStatistics<Acc>& statistics,
                                    const Acc* weight, const Acc* bias, Out* output) {
  using V = Vec<Acc>;
  const V mean = V::broadcast(statistics.mean), delta = V::broadcast(statistics.delta);
  const V rstd = V::broadcast(statistics.rstd);
  for_each_vector<Acc, kSlots>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    const V normalized = (V::load(row + i, lanes) - mean - delta) * rstd;
    fma(normalized, V::load(weight + i, lanes), V::load(bias + i, lanes)).store(output + i, lanes);
  });
}

template <class Acc>
RESNORM_INLINE void store_statistics(const RowStatistics<Acc>& statistics, std::int64_t row, void* mean, void* rstd) {
  if (mean != nullptr) static_cast<Acc*>(mean)[row] = statistics.mean;
  if (rstd != nullptr) static_cast<Acc*>(rstd)[row] = statistics.rstd;
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
