// SPDX-License-Identifier: BSD-3-Clause
// The end of a backward pass alone, because an emulated device leaves it fewer subsets than a real one.
#include "kernels/cuda/column_sums.h"

#include "../fixture.h"
#include "emulated_test.h"

namespace resnorm::cuda::testing {
namespace {

using namespace cpu::testing;

class ColumnSumsTest : public EmulatedTest {};
RESNORM_FOR_SCHEDULES(ColumnSumsTest, kSchedules);

TEST_P(ColumnSumsTest, AddsEverySubset) {
  for (const DType partial : {kF32, kF64}) {
    for (const int row_subsets : {1, 15, 16, 17, 33, 132}) {
      for (const std::int64_t cols : {1, 32, 70}) {
        SCOPED_TRACE(::testing::Message() << row_subsets << " subsets of " << cols << " columns, " << name_of(partial));
        const Matrix partials = Matrix::random(generator, row_subsets, 3 * cols, partial, {});
        Matrix first(1, cols, partial, {}), last(1, cols, kBF16, {});
        const Vector absent = {};
        ASSERT_EQ(finish_column_sums(partials.const_operand().data, partial == kF64,
                                     Plan{.row_subsets = row_subsets, .overlaps = true}, cols,
                                     {first.vector(), absent, last.vector()}, nullptr),
                  cudaSuccess);
        Values sums(1, 3 * cols), sizes(1, 3 * cols);
        for (std::int64_t subset = 0; subset < row_subsets; ++subset) {
          for (std::int64_t col = 0; col < 3 * cols; ++col) {
            sums(0, col) += partials(subset, col);
            sizes(0, col) += std::fabs(partials(subset, col));
          }
        }
        const auto expect = [&](const Matrix& gradient, std::int64_t from, const char* name) {
          Values expected(1, cols), size(1, cols);
          for (std::int64_t col = 0; col < cols; ++col) {
            expected(0, col) = sums(0, from + col);
            size(0, col) = sizes(0, from + col);
          }
          expect_close(gradient, expected, size, partial, 8, name);
        };
        expect(first, 0, "first");
        expect(last, 2 * cols, "last");
      }
    }
  }
}

}  // namespace
}  // namespace resnorm::cuda::testing
