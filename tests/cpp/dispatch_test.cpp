// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/cpu/dispatch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace resnorm::cpu {
namespace {

using ::testing::ExitedWithCode;

TEST(Dispatch, ScalarIsAlwaysThereAndTheBestComesLast) {
  const auto isas = supported_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), "scalar");
  for (const auto& isa : isas) EXPECT_EQ(kernels_for(isa).isa, isa);
  EXPECT_EXIT(
      {
        unsetenv("RESNORM_CPU_ISA");
        std::exit(kernels().isa == isas.back() ? 0 : 1);
      },
      ExitedWithCode(0), "");
}

TEST(Dispatch, EnvironmentOverrides) {
  for (const auto& isa : supported_isas()) {
    EXPECT_EXIT(
        {
          setenv("RESNORM_CPU_ISA", isa.c_str(), 1);
          std::exit(kernels().isa == isa ? 0 : 1);
        },
        ExitedWithCode(0), "");
  }
}

void exit_with_the_error_of(const char* isa) {
  setenv("RESNORM_CPU_ISA", isa, 1);
  try {
    kernels();
  } catch (const std::invalid_argument& error) {
    std::fputs(error.what(), stderr);
    std::exit(7);
  }
  std::exit(0);
}

TEST(Dispatch, UnknownNameIsAClearError) {
  EXPECT_EXIT(exit_with_the_error_of("sse9"), ExitedWithCode(7),
              "RESNORM_CPU_ISA.*scalar, avx2, avx512, avx512_bf16.*have scalar.*sse9");
}

TEST(Dispatch, MissingInstructionsAreAClearError) {
  const auto isas = supported_isas();
  for (const char* isa : {"avx2", "avx512", "avx512_bf16"}) {
    if (std::find(isas.begin(), isas.end(), isa) != isas.end()) continue;
    EXPECT_EXIT(exit_with_the_error_of(isa), ExitedWithCode(7), isa);
  }
}

}  // namespace
}  // namespace resnorm::cpu
