// SPDX-License-Identifier: BSD-3-Clause
// Gradients of weight and bias: sums over all rows. Every block of rows sums its own in the workspace; the blocks' sums
// are then added pairwise, in an order that no thread count changes, and rounded once to the gradient's type.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "row_buffer.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

template <class Acc, int kCount>
class ColumnSums {
 public:
  // `gradients` are kCount, of which some may be absent.
  ColumnSums(const Vector* gradients, std::int64_t rows, std::int64_t cols, void* workspace)
      : cols_(cols), blocks_(row_block_count(rows, cols)) {
    auto* partial = static_cast<Acc*>(workspace);
    for (int k = 0; k < kCount; ++k) {
      gradients_[k] = gradients[k];
      if (is_final(gradients[k])) {
        partials_[k] = static_cast<Acc*>(gradients[k].data);
      } else if (is_wanted(k)) {
        partials_[k] = partial;
        partial += blocks_ * cols;
      }
    }
  }

  std::int64_t blocks() const { return blocks_; }

  // body(begin, end, sums) over batches of a block's rows: the sums are zero before each and are added to the block's
  // after it. Two levels, because a sum of thousands of rows in one float loses what a sum of sums keeps. `scratch` is
  // where the sums of a batch are, unless it is all of the block, and those of what is absent.
  template <class Body>
  void accumulate(std::int64_t block, std::int64_t rows, Acc* const (&scratch)[kCount], const Body& body) const {
    const std::int64_t first = row_block_begin(block, blocks_, rows), last = row_block_begin(block + 1, blocks_, rows);
    const bool one_batch = last - first <= kRowsPerBatch;
    Acc* sums[kCount];
    for (int k = 0; k < kCount; ++k) sums[k] = one_batch && is_wanted(k) ? partials_[k] + block * cols_ : scratch[k];
    std::int64_t begin = first;
    do {
      const std::int64_t end = last - begin < kRowsPerBatch ? last : begin + kRowsPerBatch;
      for (Acc* sum : sums) __builtin_memset(sum, 0, static_cast<std::size_t>(cols_) * sizeof(Acc));
      body(begin, end, sums);
      for (int k = 0; k < kCount; ++k) {
        if (!one_batch && is_wanted(k)) add(partials_[k] + block * cols_, sums[k], begin == first);
      }
      begin = end;
    } while (begin < last);
  }

  void finish(ParallelFor parallel_for) const {
    int wanted = 0;
    for (const Vector& gradient : gradients_) wanted += gradient.data != nullptr && !is_final(gradient);
    if (wanted == 0) return;
    parallel(parallel_for, cols_, (kElementsPerTask - 1) / (wanted * blocks_) + 1,
             [&](std::int64_t begin, std::int64_t end) {
               for (int k = 0; k < kCount; ++k) {
                 if (is_wanted(k) && !is_final(gradients_[k])) merge(gradients_[k], partials_[k], begin, end);
               }
             });
  }

 private:
  bool is_wanted(int k) const { return gradients_[k].data != nullptr; }

  // Whether the only block's sums are the gradient.
  bool is_final(const Vector& gradient) const {
    return blocks_ == 1 && gradient.data != nullptr && gradient.dtype == kDType<Acc>;
  }

  void add(Acc* partial, const Acc* sums, bool first) const {
    if (first) {
      __builtin_memcpy(partial, sums, static_cast<std::size_t>(cols_) * sizeof(Acc));
    } else {
      add_row(partial, sums, cols_);
    }
  }

  static void add_row(Acc* to, const Acc* from, std::int64_t cols) {
    for_each_vector<Acc, kUnroll>(cols, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
      (Vec<Acc>::load(to + i, lanes) + Vec<Acc>::load(from + i, lanes)).store(to + i, lanes);
    });
  }

  void merge(const Vector& gradient, Acc* partials, std::int64_t begin, std::int64_t end) const {
    for (std::int64_t distance = 1; distance < blocks_; distance *= 2) {
      for (std::int64_t block = 0; block < blocks_; block += 2 * distance) {
        Acc* to = partials + block * cols_ + begin;
        add_row(to, to + distance * cols_, end - begin);
      }
    }
    visit(gradient.dtype, [&](auto tag) {
      convert_row(partials + begin, static_cast<typename decltype(tag)::Type*>(gradient.data) + begin, end - begin);
    });
  }

  static constexpr int kUnroll = 4;
  static constexpr std::int64_t kRowsPerBatch = 32;

  std::int64_t cols_, blocks_;
  Vector gradients_[kCount];
  Acc* partials_[kCount] = {};
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
