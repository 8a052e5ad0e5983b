// SPDX-License-Identifier: BSD-3-Clause
#define RESNORM_ISA avx512
#include "kernel_table.h"
