// SPDX-License-Identifier: BSD-3-Clause
// Mean and variance of rows, exact where one-sweep formulas are not: for rows far from zero.
//
// A piece of a row that fits the first cache is swept twice: a sum gives its mean, and with d = x - mean the second
// sweep finds what rounding lost of it, delta = sum(d) / N, and the squares about it, sum(d^2) - N delta^2. Pieces are
// merged in double (Chan et al. 1979), so a row is read from memory once, however long. A constant row's mean is exact.
#pragma once

#include <cstdint>

#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Independent accumulators of one row; the two sums of the second sweep, for all rows of a group, must fit in
// registers.
inline constexpr int kSlots = kRegisters / 8;

// The two rows of the group that comes next, to be prefetched: half of it beside each of the sweeps that read from the
// caches, because a core can wait for a few lines only at a time.
struct NextRows {
  NextRows(std::int64_t next, std::int64_t end)
      : first(next < end ? next : end - 1), second(next + 1 < end ? next + 1 : end - 1) {}

  std::int64_t first, second;
};

// x - mean - delta is a deviation: delta is what the mean's type cannot hold of it.
template <class Acc>
struct RowStatistics {
  Acc mean, delta, rstd;
};

// value(k, i, lanes) is a vector of row k, asked for once each and in order; from then on it can be read at rows[k] +
// i. `prefetch(i)` is called beside the second sweep, which leaves the memory idle.
template <class Acc, int kRows, class Pointer, class Value, class Prefetch>
RESNORM_INLINE void row_statistics(std::int64_t cols, double eps, const Value& value, const Pointer (&rows)[kRows],
                                   RowStatistics<Acc> (&statistics)[kRows], const Prefetch& prefetch) {
  using V = Vec<Acc>;
  // The mean so far is base + offset, so that a mean far from zero keeps its digits.
  double bases[kRows] = {}, offsets[kRows] = {}, squares[kRows] = {};
  for_each_piece(cols, [&](std::int64_t begin, std::int64_t size) RESNORM_INLINE_LAMBDA {
    V sums[kRows][kSlots] = {};
    for_each_vector<Acc, kSlots>(size, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      unrolled<kRows>([&](auto k)
                          RESNORM_INLINE_LAMBDA { sums[k][slot] = sums[k][slot] + value(k, begin + i, lanes); });
    });
    const double count = static_cast<double>(size), reciprocal_count = 1.0 / count;
    Acc means[kRows];
    unrolled<kRows>([&](auto k)
                        RESNORM_INLINE_LAMBDA { means[k] = static_cast<Acc>(total(sums[k]) * reciprocal_count); });
    V deviation_sums[kRows][kSlots] = {}, square_sums[kRows][kSlots] = {};
    for_each_vector<Acc, kSlots>(size, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      prefetch(begin + i);
      unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
        const V deviation = (V::load(rows[k] + begin + i, lanes) - V::broadcast(means[k])).only(lanes);
        deviation_sums[k][slot] = deviation_sums[k][slot] + deviation;
        square_sums[k][slot] = fma(deviation, deviation, square_sums[k][slot]);
      });
    });
    const double share = count / static_cast<double>(begin + size);
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      // Divided: the delta of a constant row is exact.
      const double delta = total(deviation_sums[k]) / count, square = total(square_sums[k]) - count * delta * delta;
      if (begin == 0) bases[k] = means[k];
      const double distance = (means[k] - bases[k]) + delta - offsets[k];
      offsets[k] += distance * share;
      squares[k] += square + distance * distance * share * static_cast<double>(begin);
    });
  });
  // A handful of double operations a row, where float ones would leave the same relative error in every element. They
  // also keep rows of huge values from Inf - Inf.
  const double reciprocal_cols = 1.0 / static_cast<double>(cols);
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    const double variance = squares[k] * reciprocal_cols;
    const Acc mean = static_cast<Acc>(bases[k] + offsets[k]);
    statistics[k] = {mean, static_cast<Acc>((bases[k] - mean) + offsets[k]),
                     static_cast<Acc>(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps))};
  });
}

// output = (x - mean) * rstd * weight + bias. `also(k, i, x, lanes)` sees every vector before its output is written;
// `prefetch(i)` as above.
template <bool kStream, class Acc, int kRows, class Pointer, class Out, class Also, class Prefetch>
RESNORM_INLINE void normalize_rows(const Pointer (&rows)[kRows], std::int64_t cols,
                                   const RowStatistics<Acc> (&statistics)[kRows], const Acc* weight, const Acc* bias,
                                   Out* const (&outputs)[kRows], const Also& also, const Prefetch& prefetch) {
  using V = Vec<Acc>;
  V means[kRows], rstds[kRows], shifts[kRows];
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    means[k] = V::broadcast(statistics[k].mean);
    rstds[k] = V::broadcast(statistics[k].rstd);
    shifts[k] = V::broadcast(-statistics[k].delta * statistics[k].rstd);
  });
  for_each_vector<Acc, 2>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
    prefetch(i);
    const V w = V::load(weight + i, lanes), b = V::load(bias + i, lanes);
    V values[kRows];
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V x = V::load(rows[k] + i, lanes);
      also(k, i, x, lanes);
      values[k] = fma(fma(x - means[k], rstds[k], shifts[k]), w, b);
    });
    put_rows<kStream>(values, outputs, i, lanes);
  });
}

template <class Acc>
RESNORM_INLINE void store_statistics(const RowStatistics<Acc>& statistics, std::int64_t row, void* mean, void* rstd) {
  if (mean != nullptr) static_cast<Acc*>(mean)[row] = statistics.mean;
  if (rstd != nullptr) static_cast<Acc*>(rstd)[row] = statistics.rstd;
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
