// SPDX-License-Identifier: BSD-3-Clause
// What takes longest to read of the headers that most units include: the build compiles it once and puts it before each
// of them. A unit includes what it uses nonetheless. No guard: GCC warns of one in what it compiles.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
