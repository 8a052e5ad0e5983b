// SPDX-License-Identifier: BSD-3-Clause
// Which instruction set's kernels run: the best that this CPU has every feature of, or the one RESNORM_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace resnorm::cpu {

// The table in use, chosen once at the first call. Throws std::invalid_argument when RESNORM_CPU_ISA is unknown or
// names instructions that this CPU lacks.
const KernelTable& kernels();

// The table of one instruction set ("scalar", "avx2", "avx512", "avx512_bf16"); throws as kernels() does.
const KernelTable& kernels_for(const std::string& isa);

// Names of the instruction sets that this CPU can run and this build has, weakest first.
std::vector<std::string> supported_isas();

}  // namespace resnorm::cpu
