// SPDX-License-Identifier: BSD-3-Clause
#define RESNORM_ISA avx512_bf16
#include "kernel_table.h"
