// SPDX-License-Identifier: BSD-3-Clause
// What the operators' tests share: every instruction set this CPU has, serial and threaded loops, dropout masks.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/workspace.h"
#include "kernels/philox.h"
#include "matrix.h"

namespace resnorm::cpu::testing {

inline void serial(std::int64_t count, std::int64_t, RangeBody body, const void* context) { body(context, 0, count); }

// `kThreads` threads and ranges as short as the grain allows, unlike any real pool.
template <int kThreads>
void threaded(std::int64_t count, std::int64_t grain, RangeBody body, const void* context) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([=] {
      for (std::int64_t begin = thread * grain; begin < count; begin += kThreads * grain) {
        body(context, begin, std::min(begin + grain, count));
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

inline Dropout dropout_of(double p, std::uint64_t seed) {
  const auto threshold = static_cast<std::uint32_t>(65536.0 * p + 0.5);
  const double scale = threshold == 65536 ? 1.0 : 65536.0 / (65536.0 - threshold);
  return {threshold, static_cast<float>(scale), seed};
}

struct Shape {
  std::int64_t rows, cols;
};

// Which elements of a matrix dropout keeps, by the contract: element e takes half-word e mod 8, low half first, of the
// block at counter e / 8. The rows may be the last ones of a longer matrix, in which they begin with `first_element`.
class KeepMask {
 public:
  KeepMask(const Dropout& dropout, Shape shape, std::int64_t first_element = 0) : cols_(shape.cols) {
    const auto first = static_cast<std::uint64_t>(first_element);
    const auto end = first + static_cast<std::uint64_t>(shape.rows * shape.cols);
    for (std::uint64_t element = first; element < end; ++element) {
      if (element == first || element % 8 == 0) block_ = philox::block(element / 8, dropout.seed);
      const std::uint32_t draw = block_.words[element % 8 / 2] >> (element % 2 * 16) & 0xFFFFU;
      kept_.push_back(draw >= dropout.threshold);
    }
  }

  bool operator()(std::int64_t row, std::int64_t col) const {
    return kept_[static_cast<std::size_t>(row * cols_ + col)];
  }

 private:
  std::int64_t cols_;
  philox::Block block_;
  std::vector<bool> kept_;
};

// Where the kernels accumulate in float64.
inline DType accumulation_of(std::initializer_list<DType> operands) {
  return std::find(operands.begin(), operands.end(), DType::kFloat64) != operands.end() ? DType::kFloat64
                                                                                        : DType::kFloat32;
}

inline std::vector<unsigned char> workspace_for(std::int64_t rows, std::int64_t cols, int column_sums, DType dtype) {
  return std::vector<unsigned char>(backward_workspace_bytes(rows, cols, column_sums, dtype), 0xFF);
}

// No rows, single columns, less and more than a vector, odd sizes, rows beyond a stack buffer, several row blocks.
inline const std::vector<Shape> kShapes = {{0, 5},  {3, 1},   {1, 2},   {5, 7},     {2, 16},   {7, 33},
                                           {4, 64}, {6, 768}, {9, 775}, {3, 10007}, {613, 130}};

inline const std::vector<Layout> kLayouts = {{0, 0}, {3, 1}};

// So many rows that their result is written past the caches, where whole lines are: `kWholeLines` with a tail.
inline constexpr std::int64_t kNonTemporalCols = 1000;
inline constexpr Layout kWholeLines{24, 0};
inline std::int64_t non_temporal_rows(DType dtype) {
  return non_temporal_bytes() / size_of(dtype) / kNonTemporalCols + 3;
}

// One row as many.
inline ConstRows repeated(const Matrix& row) {
  ConstRows rows = row.const_operand();
  rows.row_stride = 0;
  return rows;
}

inline void expect_rows_equal(const Matrix& rows, const Matrix& row) {
  rows.expect_guards_untouched();
  for (std::int64_t i = 0; i < rows.rows(); ++i) {
    for (std::int64_t col = 0; col < rows.cols(); ++col) ASSERT_EQ(rows(i, col), row(0, col)) << i << ", " << col;
  }
}

class KernelTest : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable& kernels() const { return kernels_for(GetParam()); }

  std::mt19937_64 generator{20240607};
};

inline std::string isa_name(const ::testing::TestParamInfo<std::string>& info) { return info.param; }

#define RESNORM_FOR_EVERY_ISA(Suite)                                                          \
  INSTANTIATE_TEST_SUITE_P(Isa, Suite, ::testing::ValuesIn(::resnorm::cpu::supported_isas()), \
                           ::resnorm::cpu::testing::isa_name)

}  // namespace resnorm::cpu::testing
