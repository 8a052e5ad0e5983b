// SPDX-License-Identifier: BSD-3-Clause
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace resnorm::cpu {

// Those that this build has: resnorm_ext/build/config.py says which these are.
RESNORM_DECLARE_KERNELS(scalar)
RESNORM_DECLARE_KERNELS(avx2)
RESNORM_DECLARE_KERNELS(avx512)
RESNORM_DECLARE_KERNELS(avx512_bf16)

namespace {

constexpr const char* kOverride = "RESNORM_CPU_ISA";

#define RESNORM_KERNELS(isa)                                                                                       \
  {isa::norm_forward_kernels, isa::norm_backward_kernels,      isa::residual_add_kernels, isa::activation_kernels, \
   isa::attention_kernels,    isa::attention_backward_kernels, isa::linear_kernels,       #isa}

// The tables of every instruction set that this build has and whose flags name only features that this CPU and its
// operating system have, weakest first.
std::vector<KernelTable> make_supported_tables() {
  std::vector<KernelTable> tables = {RESNORM_KERNELS(scalar)};
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq");
#if defined(RESNORM_WITH_AVX2)
  if (avx2) tables.push_back(RESNORM_KERNELS(avx2));
#endif
#if defined(RESNORM_WITH_AVX512)
  if (avx512) tables.push_back(RESNORM_KERNELS(avx512));
#endif
#if defined(RESNORM_WITH_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(RESNORM_KERNELS(avx512_bf16));
#endif
#endif
  return tables;
}

const std::vector<KernelTable>& supported_tables() {
  static const std::vector<KernelTable> tables = make_supported_tables();
  return tables;
}

const KernelTable& select() {
  const char* requested = std::getenv(kOverride);
  if (requested != nullptr && *requested != '\0') return kernels_for(requested);
  return supported_tables().back();
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& selected = select();
  return selected;
}

const KernelTable& kernels_for(const std::string& isa) {
  std::string supported;
  for (const KernelTable& table : supported_tables()) {
    if (isa == table.isa) return table;
    supported += (supported.empty() ? "" : ", ") + std::string(table.isa);
  }
  throw std::invalid_argument(std::string(kOverride) + " expected one of scalar, avx2, avx512, avx512_bf16, of which " +
                              "this CPU and build have " + supported + "; got " + isa);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable& table : supported_tables()) names.emplace_back(table.isa);
  return names;
}

}  // namespace resnorm::cpu
