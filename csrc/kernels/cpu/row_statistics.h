// SPDX-License-Identifier: BSD-3-Clause
// Statistics of rows: mean and variance where a norm is centered, else the mean of the squares, for which the sums
// below are taken about 0.
//
// Mean and variance are exact where one-sweep formulas are not: for rows far from zero. With a base near the mean, the
// mean of a row's first vector, one sweep sums d = x - base and d^2, of numbers as small as the row's deviations. Where
// the first vector turns out to be unlike its row, the sweep is repeated from the mean. A constant row's mean is exact.
#pragma once

#include <cstdint>

#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Sums over a row of d = x - base and of its square.
template <class Acc>
struct Moments {
  Acc base = 0;
  double deviations = 0, squares = 0;
};

// The sums in the making. Long rows are summed in pieces: see for_each_piece. A norm that is not centered needs those
// of the squares alone.
template <bool kCentered, class Acc>
class MomentSums {
 public:
  using V = Vec<Acc>;
  static constexpr int kSlots = 2;  // more, for a group of rows, would not stay in registers

  RESNORM_INLINE void set_base(Acc base) {
    moments_.base = base;
    base_ = V::broadcast(base);
  }

  template <class Lanes>
  RESNORM_INLINE void add(int slot, V x, Lanes lanes) {
    const V deviation = (kCentered ? x - base_ : x).only(lanes);
    if constexpr (kCentered) deviations_[slot] = deviations_[slot] + deviation;
    squares_[slot] = fma(deviation, deviation, squares_[slot]);
  }

  RESNORM_INLINE void end_piece() {
    if constexpr (kCentered) moments_.deviations += total(deviations_);
    moments_.squares += total(squares_);
    unrolled<kSlots>([&](auto slot) RESNORM_INLINE_LAMBDA { deviations_[slot] = squares_[slot] = V{}; });
  }

  RESNORM_INLINE Moments<Acc> moments() const { return moments_; }

 private:
  V base_ = {}, deviations_[kSlots] = {}, squares_[kSlots] = {};
  Moments<Acc> moments_;
};

template <class Acc, class T>
RESNORM_NOINLINE Moments<Acc> moments_about(Acc base, const T* row, std::int64_t cols) {
  using Sums = MomentSums<true, Acc>;
  Sums sums;
  sums.set_base(base);
  for_each_piece<Acc, Sums::kSlots>(cols, [&](std::int64_t begin, std::int64_t size) RESNORM_INLINE_LAMBDA {
    for_each_vector<Acc, Sums::kSlots>(size, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      sums.add(slot, Vec<Acc>::load(row + begin + i, lanes), lanes);
    });
    sums.end_piece();
  });
  return sums.moments();
}

// x - mean - delta is a deviation: delta is what the mean's type cannot hold of it. Both are 0 where a norm is not
// centered.
template <class Acc>
struct RowStatistics {
  Acc mean, delta, rstd;
};

template <class Acc>
RESNORM_INLINE Acc reciprocal_deviation(double variance, double eps) {
  return static_cast<Acc>(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps));
}

// From its moments; a row's values can be read at `row`. A handful of double operations a row, where float ones would
// leave the same relative error in every element.
template <class Acc, class T>
RESNORM_INLINE RowStatistics<Acc> statistics_from(Moments<Acc> moments, const T* row, std::int64_t cols, double eps) {
  const double reciprocal_cols = 1.0 / static_cast<double>(cols);
  const auto offset = [&] { return moments.deviations * reciprocal_cols; };
  const auto variance = [&] { return moments.squares * reciprocal_cols - offset() * offset(); };
  // A base farther from the mean than that would double the rounding errors, and soon worse.
  if (offset() * offset() > variance()) [[unlikely]] {
    moments = moments_about(static_cast<Acc>(moments.base + offset()), row, cols);
  }
  const Acc mean = static_cast<Acc>(moments.base + offset());
  return {mean, static_cast<Acc>((moments.base - mean) + offset()), reciprocal_deviation<Acc>(variance(), eps)};
}

// Sums over a group of rows. value(k, i, lanes) is a vector of row k, asked for once each and in order.
template <bool kCentered, class Acc, int kRows, class Value>
RESNORM_INLINE void add_moments(std::int64_t cols, const Value& value, MomentSums<kCentered, Acc> (&sums)[kRows]) {
  using V = Vec<Acc>;
  constexpr int kSlots = MomentSums<kCentered, Acc>::kSlots;
  const FirstLanes first{static_cast<int>(cols < V::kSize ? cols : V::kSize)};
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    const V x = value(k, 0, first);
    if constexpr (kCentered) sums[k].set_base(cols < V::kSize ? x.first() : x.sum() * (Acc(1) / V::kSize));
    sums[k].add(0, x, first);
  });
  for_each_piece<Acc, kSlots>(cols - V::kSize, [&](std::int64_t begin, std::int64_t size) RESNORM_INLINE_LAMBDA {
    for_each_vector<Acc, kSlots>(size, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      unrolled<kRows>([&](auto k)
                          RESNORM_INLINE_LAMBDA { sums[k].add(slot, value(k, V::kSize + begin + i, lanes), lanes); });
    });
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA { sums[k].end_piece(); });
  });
}

// Of a group of rows from their sums; the rows' values can be read at `rows`.
template <bool kCentered, class Acc, int kRows, class Pointer>
RESNORM_INLINE void row_statistics(std::int64_t cols, double eps, const MomentSums<kCentered, Acc> (&sums)[kRows],
                                   const Pointer (&rows)[kRows], RowStatistics<Acc> (&statistics)[kRows]) {
  unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
    if constexpr (kCentered) {
      statistics[k] = statistics_from(sums[k].moments(), rows[k], cols, eps);
    } else {
      statistics[k] = {0, 0, reciprocal_deviation<Acc>(sums[k].moments().squares / static_cast<double>(cols), eps)};
    }
  });
}

// output = (x - mean) * rstd * weight + bias, or x * rstd * weight where a norm is not centered. `also(k, i, x, lanes)`
// sees every vector before its output is written; `prefetch(k, i)` is called beside every vector: this sweep reads from
// the caches and leaves the memory idle.
template <bool kCentered, bool kNonTemporal, class Acc, int kRows, class Pointer, class Out, class Also, class Prefetch>
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
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA { prefetch(k, i); });
    const V w = V::load(weight + i, lanes);
    V b;
    if constexpr (kCentered) b = V::load(bias + i, lanes);
    V values[kRows];
    unrolled<kRows>([&](auto k) RESNORM_INLINE_LAMBDA {
      const V x = V::load(rows[k] + i, lanes);
      also(k, i, x, lanes);
      if constexpr (kCentered) {
        values[k] = fma(fma(x - means[k], rstds[k], shifts[k]), w, b);
      } else {
        values[k] = x * rstds[k] * w;
      }
    });
    put_rows<kNonTemporal>(values, outputs, i, lanes);
  });
}

template <class Acc>
RESNORM_INLINE void store_statistics(const RowStatistics<Acc>& statistics, std::int64_t row, void* mean, void* rstd) {
  if (mean != nullptr) static_cast<Acc*>(mean)[row] = statistics.mean;
  if (rstd != nullptr) static_cast<Acc*>(rstd)[row] = statistics.rstd;
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
