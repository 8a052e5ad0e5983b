// SPDX-License-Identifier: BSD-3-Clause
// Fibers, and what the sanitizers must be told of them. This and everything that includes it is compiled without
// sanitizers; RESNORM_SIMT_ADDRESS_SANITIZER and RESNORM_SIMT_THREAD_SANITIZER say which one the kernels have.
//
// No template may be instantiated here on types that the instrumented sources use too: the linker would be free to keep
// the instrumented copy for everybody.
#pragma once

#include <cstddef>

namespace resnorm::simt {

// The caller of launch() is one as well; its stack is its own.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;    // of AddressSanitizer
  void* thread_state = nullptr;  // of ThreadSanitizer
};

// Once per fiber: a stack, with a page below it that must not be touched.
void allocate(Fiber& fiber);
// Before each run, which begins with a call of `entry`. That must call entered() first and must not return.
void prepare(Fiber& fiber, void (*entry)());
void entered();
void switch_fiber(Fiber& from, Fiber& to);
// The same, for the last time before `from` is prepared again.
void leave_fiber(Fiber& from, Fiber& to);

// For the fiber that will be the first to be switched from.
void adopt_caller(Fiber& caller);

// Edges for ThreadSanitizer. What one fiber did before it released a tag happens before all that another one does once
// it has acquired it. Switching from one to the other orders nothing.
void release(const void* tag);
void acquire(const void* tag);
// acquire(tag), on behalf of a fiber that does not run.
void acquire_for(Fiber& fiber, const void* tag);

// GCC expands memcpy and memset after it has instrumented what it takes for accesses.
void announce_read(const void* at, std::size_t bytes);
void announce_write(const void* at, std::size_t bytes);

// While there is one of these, ThreadSanitizer overlooks what this fiber does. For bookkeeping that several fibers
// change: the calls of memmove, new and delete of a growing vector are seen, whoever makes them.
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// AddressSanitizer reports every access from now on, until the memory is freed. A multiple of 8 bytes, aligned to them.
void forbid(const void* at, std::size_t bytes);

}  // namespace resnorm::simt
