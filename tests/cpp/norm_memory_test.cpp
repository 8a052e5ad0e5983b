// SPDX-License-Identifier: BSD-3-Clause
// What must not change the norms' results: where they are written, who shares the work, how rows lie.
#include "norm_problem.h"

namespace resnorm::cpu::testing {
namespace {

using Problem = NormProblem;

class NormMemoryTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(NormMemoryTest);

TEST_P(NormMemoryTest, OutputMayBeInput) {
  for (const DType dtype : {kFloat32, kFloat64, kBFloat16, kFloat16}) {
    for (const bool centered : {true, false}) {
      Problem apart(generator, {7, 77}, same(dtype), {1, 1}, {.centered = centered});
      apart.forward(kernels(), serial);
      Problem together = apart;
      NormForward arguments = together.forward_arguments();
      arguments.output = together.input.operand();
      kernels().norm_forward(arguments, serial);
      EXPECT_EQ(together.input.storage(), apart.output.storage()) << name_of(dtype);
    }
  }
}

TEST_P(NormMemoryTest, SumMayBeResidualAndOutputMayBeInput) {
  const NormTypes wide_residual{kBFloat16, kFloat32, kFloat32, kBFloat16};
  for (const NormTypes types : {same(kFloat32), same(kFloat64), same(kBFloat16), same(kFloat16), wide_residual}) {
    for (const double p : {0.0, 0.3}) {
      for (const bool centered : {true, false}) {
        const NormOptions options{.centered = centered, .adds = true, .p = p, .input_bias = true};
        Problem apart(generator, {7, 77}, types, {1, 1}, options);
        apart.forward(kernels(), serial);
        Problem together = apart;
        NormForward arguments = together.forward_arguments();
        arguments.output = together.input.operand();
        arguments.sum = together.residual.operand();
        kernels().norm_forward(arguments, serial);
        EXPECT_EQ(together.input.storage(), apart.output.storage()) << types << " " << options;
        EXPECT_EQ(together.residual.storage(), apart.sum.storage()) << types << " " << options;
      }
    }
  }
}

TEST_P(NormMemoryTest, OutputMayBeInputWithoutSum) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    for (const bool centered : {true, false}) {
      Problem apart(generator, {7, 77}, same(dtype), {1, 1},
                    {.centered = centered, .adds = true, .p = 0.3, .input_bias = true});
      apart.forward(kernels(), serial);
      Problem together = apart;
      NormForward arguments = together.forward_arguments();
      arguments.output = together.input.operand();
      arguments.sum.data = nullptr;
      kernels().norm_forward(arguments, serial);
      EXPECT_EQ(together.input.storage(), apart.output.storage()) << name_of(dtype);
    }
  }
}

TEST_P(NormMemoryTest, ThreadsChangeNothing) {
  struct Case {
    Shape shape;
    NormTypes types;
    bool adds;
  };
  std::vector<Case> cases;
  for (const Shape shape : {Shape{613, 130}, Shape{1031, 257}, Shape{9, 20000}}) {
    for (const DType dtype : {kFloat32, kBFloat16}) cases.push_back({shape, same(dtype), false});
  }
  for (const NormTypes types : {same(kFloat32), same(kBFloat16), {kBFloat16, kFloat32, kFloat32, kBFloat16}}) {
    cases.push_back({{1031, 257}, types, true});
  }
  for (const auto& [shape, types, adds] : cases) {
    for (const bool centered : {true, false}) {
      const NormOptions options{.centered = centered, .adds = adds, .p = adds ? 0.1 : 0.0, .input_bias = adds};
      ASSERT_GT(workspace_for(shape.rows, shape.cols, 1, kFloat32).size(), shape.cols * sizeof(float))
          << "one block of rows cannot be cut for threads";
      Problem alone(generator, shape, types, {}, options);
      Problem two = alone, five = alone;
      alone.forward(kernels(), serial), alone.backward(kernels(), serial);
      two.forward(kernels(), threaded<2>), two.backward(kernels(), threaded<2>);
      five.forward(kernels(), threaded<5>), five.backward(kernels(), threaded<5>);
      for (const Problem* other : {&two, &five}) {
        for (Matrix Problem::* result :
             {&Problem::output, &Problem::sum, &Problem::mean, &Problem::rstd, &Problem::grad_input,
              &Problem::grad_residual, &Problem::grad_weight, &Problem::grad_bias, &Problem::grad_input_bias}) {
          EXPECT_EQ((alone.*result).storage(), (other->*result).storage()) << types << " " << options;
        }
      }
    }
  }
}

TEST_P(NormMemoryTest, ResultsBeyondTheCachesAreTheSame) {
  for (const DType dtype : {kFloat32, kFloat64, kBFloat16, kFloat16}) {
    for (const bool centered : {true, false}) {
      Problem one(generator, {1, kNonTemporalCols}, same(dtype), {}, {.centered = centered});
      one.forward(kernels(), serial);
      one.backward(kernels(), serial);
      const std::int64_t rows = non_temporal_rows(dtype);
      Matrix output(rows, kNonTemporalCols, dtype, kWholeLines), grad_input = output;
      Matrix mean, rstd(1, rows, one.rstd.dtype());
      if (centered) mean = rstd;
      NormForward forward = one.forward_arguments();
      forward.rows = rows;
      forward.input = repeated(one.input);
      forward.output = output.operand();
      forward.mean = mean.vector().data;
      forward.rstd = rstd.vector().data;
      kernels().norm_forward(forward, threaded<2>);
      NormBackward backward = one.backward_arguments();
      backward.rows = rows;
      backward.grad_output = repeated(one.grad_output);
      backward.sum = repeated(one.input);
      backward.mean = mean.vector().data;
      backward.rstd = rstd.vector().data;
      backward.grad_input = grad_input.operand();
      backward.grad_weight = backward.grad_bias = {};
      kernels().norm_backward(backward, threaded<2>);
      expect_rows_equal(output, one.output);
      expect_rows_equal(grad_input, one.grad_input);
    }
  }
}

TEST_P(NormMemoryTest, SumsBeyondTheCachesAreTheSame) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    for (const bool stores_sum : {true, false}) {
      for (const bool centered : {true, false}) {
        Problem one(generator, {1, kNonTemporalCols}, same(dtype), {}, {.centered = centered, .adds = true});
        one.forward(kernels(), serial);
        const std::int64_t rows = non_temporal_rows(dtype);
        Matrix output(rows, kNonTemporalCols, dtype, kWholeLines), sum;
        if (stores_sum) sum = output;
        NormForward forward = one.forward_arguments();
        forward.rows = rows;
        forward.input = repeated(one.input);
        forward.residual = repeated(one.residual);
        forward.output = output.operand();
        forward.sum = stores_sum ? sum.operand() : Rows{.dtype = dtype};
        forward.mean = forward.rstd = nullptr;
        kernels().norm_forward(forward, threaded<2>);
        expect_rows_equal(output, one.output);
        if (stores_sum) expect_rows_equal(sum, one.sum);
      }
    }
  }
}

TEST_P(NormMemoryTest, RowsMayBeOneRowRepeated) {
  for (const bool centered : {true, false}) {
    Problem problem(generator, {6, 40}, same(kFloat32), {}, {.centered = centered});
    problem.forward(kernels(), serial);
    Problem repeated_rows = problem;
    for (std::int64_t row = 0; row < 6; ++row) {
      for (std::int64_t col = 0; col < 40; ++col) repeated_rows.grad_output.set(row, col, problem.grad_output(0, col));
    }
    repeated_rows.backward(kernels(), serial);
    NormBackward arguments = problem.backward_arguments();
    arguments.grad_output = repeated(problem.grad_output);
    problem.backward(kernels(), serial, arguments);
    EXPECT_EQ(problem.grad_input.storage(), repeated_rows.grad_input.storage());
    EXPECT_EQ(problem.grad_weight.storage(), repeated_rows.grad_weight.storage());
    EXPECT_EQ(problem.grad_bias.storage(), repeated_rows.grad_bias.storage());
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
