// SPDX-License-Identifier: BSD-3-Clause
#include "layer_norm_reference.h"
#include "residual_reference.h"

namespace resnorm::cpu::testing {
namespace {

using enum DType;

constexpr double kEps = 1e-5;

class AddLayerNormTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(AddLayerNormTest);

struct Types {
  DType input, residual, sum, parameters;

  DType accumulation() const { return accumulation_of({input, sum}); }
};

std::ostream& operator<<(std::ostream& out, Types types) {
  return out << name_of(types.input) << "+" << name_of(types.residual) << " -> " << name_of(types.sum) << ", "
             << name_of(types.parameters);
}

const std::vector<Types> kTypes = {
    {kFloat32, kFloat32, kFloat32, kFloat32},     {kFloat64, kFloat64, kFloat64, kFloat64},
    {kBFloat16, kBFloat16, kBFloat16, kBFloat16}, {kFloat16, kFloat16, kFloat16, kFloat16},
    {kBFloat16, kBFloat16, kBFloat16, kFloat32},  {kBFloat16, kFloat32, kFloat32, kBFloat16},
    {kFloat16, kFloat32, kFloat32, kFloat32},     {kBFloat16, kBFloat16, kFloat32, kBFloat16},
    {kFloat32, kBFloat16, kFloat32, kFloat32},    {kFloat32, kFloat64, kFloat64, kFloat32},
    {kFloat16, kBFloat16, kFloat32, kFloat64},    {kFloat32, kFloat64, kFloat32, kFloat32},
    {kFloat64, kFloat32, kBFloat16, kFloat64},
};

struct Options {
  double p = 0.0;
  bool input_bias = false, affine = true, prenorm = true;
};

const std::vector<Options> kOptions = {
    {},
    {.affine = false, .prenorm = false},
    {.p = 0.3},
    {.input_bias = true, .prenorm = false},
    {.p = 0.3, .input_bias = true, .affine = false},
};

struct Problem {
  Types types;
  Options options;
  Dropout dropout;
  KeepMask kept;
  Matrix input, residual, input_bias, weight, bias, output, sum, mean, rstd;
  Matrix grad_output, grad_sum, grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias;

  Problem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, Options options)
      : types(types), options(options), dropout(dropout_of(options.p, 0xFEDCBA9876543210ULL)), kept(dropout, shape) {
    const auto [rows, cols] = shape;
    const Layout aligned_as{0, layout.offset};
    const auto random = [&](DType dtype) { return Matrix::random(generator, rows, cols, dtype, layout); };
    const auto random_vector = [&](DType dtype, double mean) {
      return Matrix::random(generator, 1, cols, dtype, aligned_as, mean);
    };
    input = random(types.input), residual = random(types.residual);
    output = Matrix(rows, cols, types.input, layout), sum = Matrix(rows, cols, types.sum, layout);
    mean = rstd = Matrix(1, rows, types.accumulation());
    grad_output = random(types.input);
    if (options.prenorm) grad_sum = random(types.sum);
    grad_input = Matrix(rows, cols, types.input, layout);
    grad_residual = Matrix(rows, cols, types.residual, layout);
    if (options.affine) {
      weight = random_vector(types.parameters, 1.0), bias = random_vector(types.parameters, 0.0);
      grad_weight = grad_bias = Matrix(1, cols, types.parameters, aligned_as);
    }
    if (options.input_bias) {
      input_bias = random_vector(types.parameters, 0.0);
      grad_input_bias = Matrix(1, cols, types.parameters, aligned_as);
    }
  }

  void forward(const KernelTable& kernels, ParallelFor parallel_for) {
    forward(kernels, parallel_for, output.operand(), sum.operand());
  }

  void forward(const KernelTable& kernels, ParallelFor parallel_for, Rows output_rows, Rows sum_rows) {
    kernels.add_layer_norm_forward({.rows = input.rows(),
                                    .cols = input.cols(),
                                    .input = input.const_operand(),
                                    .residual = residual.const_operand(),
                                    .input_bias = input_bias.const_vector(),
                                    .weight = weight.const_vector(),
                                    .bias = bias.const_vector(),
                                    .dropout = dropout,
                                    .eps = kEps,
                                    .output = output_rows,
                                    .sum = sum_rows,
                                    .mean = mean.vector().data,
                                    .rstd = rstd.vector().data},
                                   parallel_for);
  }

  void backward(const KernelTable& kernels, ParallelFor parallel_for) {
    const int column_sums = grad_weight.present() + grad_bias.present() + grad_input_bias.present();
    auto workspace = workspace_for(sum.rows(), sum.cols(), column_sums, types.accumulation());
    kernels.add_layer_norm_backward({.rows = sum.rows(),
                                     .cols = sum.cols(),
                                     .grad_output = grad_output.const_operand(),
                                     .grad_sum = grad_sum.const_operand(),
                                     .sum = sum.const_operand(),
                                     .weight = weight.const_vector(),
                                     .mean = mean.vector().data,
                                     .rstd = rstd.vector().data,
                                     .dropout = dropout,
                                     .grad_input = grad_input.operand(),
                                     .grad_residual = grad_residual.operand(),
                                     .grad_weight = grad_weight.vector(),
                                     .grad_bias = grad_bias.vector(),
                                     .grad_input_bias = grad_input_bias.vector(),
                                     .workspace = workspace.data()},
                                    parallel_for);
  }

  // Rows whose sum is far smaller than its terms (each rounded to float32) need room for the terms' rounding.
  void expect_forward_correct() const {
    const auto rows = input.rows(), cols = input.cols();
    const auto sums = residual_sum(input, residual, input_bias, dropout, kept);
    expect_close(sum, sums.sum, sums.scale, types.accumulation(), 4, "sum");
    auto want = normalize(sums.sum, rows, cols, weight, bias, kEps);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        want.scale(row, col) += sums.scale(row, col) * want.rstd[row] * std::fabs(weight_at(weight, col));
      }
    }
    expect_close(output, want.output, want.scale, types.accumulation(), 16, "output");
  }

  void expect_backward_correct() const {
    const auto accumulation = types.accumulation();
    auto norm = normalize_backward(grad_output, sum, weight, rstd);
    expect_close(grad_weight, norm.grad_weight, norm.grad_weight_scale, accumulation, 8, "grad_weight");
    expect_close(grad_bias, norm.grad_bias, norm.grad_bias_scale, accumulation, 8, "grad_bias");
    const auto residual = residual_gradients(norm, grad_sum, dropout, kept, {sum.rows(), sum.cols()});
    expect_close(grad_residual, norm.grad_input, norm.grad_input_scale, accumulation, 8, "grad_residual");
    expect_close(grad_input, residual.input, residual.input_scale, accumulation, 8, "grad_input");
    expect_close(grad_input_bias, residual.input_bias, residual.input_bias_scale, accumulation, 8, "grad_input_bias");
  }
};

TEST_P(AddLayerNormTest, MatchesFloat64Reference) {
  for (const Types types : kTypes) {
    for (std::size_t shape = 0; shape < kShapes.size(); ++shape) {
      for (std::size_t option = 0; option < kOptions.size(); ++option) {
        const Options options = kOptions[option];
        SCOPED_TRACE(::testing::Message()
                     << types << " " << kShapes[shape].rows << "x" << kShapes[shape].cols << " options " << option);
        Problem problem(generator, kShapes[shape], types, kLayouts[(shape + option) % 2], options);
        problem.forward(kernels(), serial);
        problem.expect_forward_correct();
        problem.backward(kernels(), serial);
        problem.expect_backward_correct();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(AddLayerNormTest, SumAndStatisticsAreOptional) {
  for (const Types types : kTypes) {
    SCOPED_TRACE(::testing::Message() << types);
    Problem problem(generator, {5, 91}, types, {1, 1}, {.p = 0.2, .input_bias = true});
    problem.sum = problem.mean = problem.rstd = {};
    problem.forward(kernels(), serial);
    if (types.accumulation() == accumulation_of({types.input})) problem.expect_forward_correct();
  }
}

TEST_P(AddLayerNormTest, EveryGradientIsOptional) {
  for (int mask = 0; mask < 128; ++mask) {
    SCOPED_TRACE(mask);
    Problem problem(generator, {5, 37}, {kBFloat16, kFloat32, kFloat32, kFloat32}, {},
                    {.p = mask & 1 ? 0.2 : 0.0, .input_bias = true});
    problem.forward(kernels(), serial);
    if (mask & 2) problem.grad_input = {};
    if (mask & 4) problem.grad_residual = {};
    if (mask & 8) problem.grad_weight = {};
    if (mask & 16) problem.grad_bias = {};
    if (mask & 32) problem.grad_input_bias = {};
    if (mask & 64) problem.grad_output = {};
    problem.backward(kernels(), serial);
    problem.expect_backward_correct();
  }
}

TEST_P(AddLayerNormTest, SumMayBeResidualAndOutputMayBeInput) {
  for (const Types types : {kTypes[0], kTypes[1], kTypes[2], kTypes[3], kTypes[5]}) {
    for (const double p : {0.0, 0.3}) {
      Problem apart(generator, {7, 77}, types, {1, 1}, {.p = p, .input_bias = true});
      apart.forward(kernels(), serial);
      Problem together = apart;
      together.forward(kernels(), serial, together.input.operand(), together.residual.operand());
      EXPECT_EQ(together.input.storage(), apart.output.storage()) << types << " p=" << p;
      EXPECT_EQ(together.residual.storage(), apart.sum.storage()) << types << " p=" << p;
    }
  }
}

TEST_P(AddLayerNormTest, OutputMayBeInputWithoutSum) {
  for (const Types types : {kTypes[0], kTypes[2]}) {
    Problem apart(generator, {7, 77}, types, {1, 1}, {.p = 0.3, .input_bias = true});
    apart.forward(kernels(), serial);
    Problem together = apart;
    together.forward(kernels(), serial, together.input.operand(), {});
    EXPECT_EQ(together.input.storage(), apart.output.storage()) << types;
  }
}

TEST_P(AddLayerNormTest, ThreadsChangeNothing) {
  for (const Types types : {kTypes[0], kTypes[2], kTypes[5]}) {
    Problem alone(generator, {1031, 257}, types, {}, {.p = 0.1, .input_bias = true});
    Problem two = alone, five = alone;
    alone.forward(kernels(), serial), alone.backward(kernels(), serial);
    two.forward(kernels(), threaded<2>), two.backward(kernels(), threaded<2>);
    five.forward(kernels(), threaded<5>), five.backward(kernels(), threaded<5>);
    for (const Problem* other : {&two, &five}) {
      for (Matrix Problem::* result :
           {&Problem::output, &Problem::sum, &Problem::mean, &Problem::rstd, &Problem::grad_input,
            &Problem::grad_residual, &Problem::grad_weight, &Problem::grad_bias, &Problem::grad_input_bias}) {
        EXPECT_EQ((alone.*result).storage(), (other->*result).storage()) << types;
      }
    }
  }
}

TEST_P(AddLayerNormTest, DroppedElementsAddNothing) {
  for (const double p : {0.5, 0.99999, 1.0}) {
    Problem problem(generator, {9, 775}, {kFloat32, kFloat32, kFloat32, kFloat32}, {}, {.p = p});
    for (std::int64_t row = 0; row < 9; ++row) {
      for (std::int64_t col = 0; col < 775; ++col) {
        if (!problem.kept(row, col)) problem.input.set(row, col, std::nan(""));
      }
    }
    problem.forward(kernels(), serial);
    problem.expect_forward_correct();
    problem.backward(kernels(), serial);
    problem.expect_backward_correct();
    if (p < 1) continue;
    for (std::int64_t col = 0; col < 775; ++col) {
      ASSERT_EQ(problem.sum(3, col), problem.residual(3, col));
      ASSERT_EQ(problem.grad_input(3, col), 0.0);
    }
  }
}

TEST_P(AddLayerNormTest, ResultsBeyondTheCachesAreTheSame) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    for (const bool stores_sum : {true, false}) {
      Problem one(generator, {1, kStreamedCols}, {dtype, dtype, dtype, dtype}, {}, {});
      one.forward(kernels(), serial);
      const std::int64_t rows = streamed_rows(dtype);
      Matrix output(rows, kStreamedCols, dtype, kWholeLines), sum;
      if (stores_sum) sum = output;
      kernels().add_layer_norm_forward({.rows = rows,
                                        .cols = kStreamedCols,
                                        .input = repeated(one.input),
                                        .residual = repeated(one.residual),
                                        .weight = one.weight.const_vector(),
                                        .bias = one.bias.const_vector(),
                                        .eps = kEps,
                                        .output = output.operand(),
                                        .sum = stores_sum ? sum.operand() : Rows{.dtype = dtype}},
                                       threaded<2>);
      expect_rows_equal(output, one.output);
      if (stores_sum) expect_rows_equal(sum, one.sum);
    }
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
