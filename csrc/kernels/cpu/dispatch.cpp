// SPDX-License-Identifier: BSD-3-Clause
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace resnorm::cpu {

namespace scalar {
extern const KernelTable kernel_table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kernel_table;
}
namespace avx512 {
extern const KernelTable kernel_table;
}
namespace avx512_bf16 {
extern const KernelTable kernel_table;
}
#endif

namespace {

constexpr const char* kOverride = "RESNORM_CPU_ISA";

// The tables of every instruction set whose flags name only features that this CPU and its operating system have.
std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables = {&scalar::kernel_table};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) tables.push_back(&avx2::kernel_table);
  if (avx512) tables.push_back(&avx512::kernel_table);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16::kernel_table);
#endif
  return tables;
}

const KernelTable& select() {
  const char* requested = std::getenv(kOverride);
  if (requested != nullptr && *requested != '\0') return kernels_for(requested);
  return *supported_tables().back();
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& selected = select();
  return selected;
}

const KernelTable& kernels_for(const std::string& isa) {
  std::string supported;
  for (const KernelTable* table : supported_tables()) {
    if (isa == table->isa) return *table;
    supported += (supported.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument(std::string(kOverride) + " expected one of scalar, avx2, avx512, avx512_bf16, of which " +
                              "this CPU and build have " + supported + "; got " + isa);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_tables()) names.emplace_back(table->isa);
  return names;
}

}  // namespace resnorm::cpu
