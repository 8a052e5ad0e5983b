// SPDX-License-Identifier: BSD-3-Clause
#define RESNORM_ISA scalar
#include "kernel_table.h"
