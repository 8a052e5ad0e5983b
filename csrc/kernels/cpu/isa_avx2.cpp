// SPDX-License-Identifier: BSD-3-Clause
#define RESNORM_ISA avx2
#include "kernel_table.h"
