// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.h"

#include <sys/mman.h>

#include "launch.h"

#ifdef RESNORM_SIMT_ADDRESS_SANITIZER
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, std::size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** previous_stack, std::size_t* previous_bytes);
void __asan_poison_memory_region(const void* at, std::size_t bytes);
}
#endif
#ifdef RESNORM_SIMT_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
void __tsan_read_range(void* at, unsigned long bytes);
void __tsan_write_range(void* at, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);

// There are no threads whose races it would be worth to wait for at the end, a second each time.
__attribute__((visibility("default"))) const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }
}
#endif

// Eight instructions, 30 times faster than swapcontext, which asks the kernel for the signal mask.
extern "C" void resnorm_simt_switch(void** save, void* load);
asm(R"(
.text
.globl resnorm_simt_switch
.hidden resnorm_simt_switch
.type resnorm_simt_switch,@function
resnorm_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnorm_simt_switch,.-resnorm_simt_switch
)");

namespace resnorm::simt {

namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kStackBytes = 128 * 1024;
constexpr int kSavedRegisters = 6;

#ifdef RESNORM_SIMT_ADDRESS_SANITIZER
Fiber* switched_from = nullptr;
#endif

void change(Fiber& from, Fiber& to, [[maybe_unused]] bool from_comes_back) {
#ifdef RESNORM_SIMT_ADDRESS_SANITIZER
  switched_from = &from;
  __sanitizer_start_switch_fiber(from_comes_back ? &from.fake_stack : nullptr, to.stack, to.stack_bytes);
#endif
#ifdef RESNORM_SIMT_THREAD_SANITIZER
  constexpr unsigned kNoEdge = 1;
  __tsan_switch_to_fiber(to.thread_state, kNoEdge);
#endif
  resnorm_simt_switch(&from.stack_pointer, to.stack_pointer);
#ifdef RESNORM_SIMT_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace

void allocate(Fiber& fiber) {
  auto* mapping = static_cast<char*>(mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (mapping == MAP_FAILED || mprotect(mapping, kPageBytes, PROT_NONE) != 0) fail("no memory for a stack");
  fiber.stack = mapping + kPageBytes;
  fiber.stack_bytes = kStackBytes;
#ifdef RESNORM_SIMT_THREAD_SANITIZER
  fiber.thread_state = __tsan_create_fiber(0);
#endif
}

void prepare(Fiber& fiber, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(const_cast<char*>(static_cast<const char*>(fiber.stack)) + fiber.stack_bytes);
  *--top = nullptr;  // in place of a return address: the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.fake_stack = nullptr;
}

void entered() {
#ifdef RESNORM_SIMT_ADDRESS_SANITIZER
  // The way to learn the bounds of the caller's own stack, which it needs in order to come back.
  __sanitizer_finish_switch_fiber(nullptr, &switched_from->stack, &switched_from->stack_bytes);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) { change(from, to, true); }
void leave_fiber(Fiber& from, Fiber& to) { change(from, to, false); }

#ifdef RESNORM_SIMT_THREAD_SANITIZER
void adopt_caller(Fiber& caller) { caller.thread_state = __tsan_get_current_fiber(); }
void release(const void* tag) { __tsan_release(const_cast<void*>(tag)); }
void acquire(const void* tag) { __tsan_acquire(const_cast<void*>(tag)); }
void acquire_for(Fiber& fiber, const void* tag) {
  void* const here = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.thread_state, 1);
  acquire(tag);
  __tsan_switch_to_fiber(here, 1);
}
void announce_read(const void* at, std::size_t bytes) { __tsan_read_range(const_cast<void*>(at), bytes); }
void announce_write(const void* at, std::size_t bytes) { __tsan_write_range(const_cast<void*>(at), bytes); }
Unwatched::Unwatched() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unwatched::~Unwatched() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
void adopt_caller(Fiber&) {}
void release(const void*) {}
void acquire(const void*) {}
void acquire_for(Fiber&, const void*) {}
void announce_read(const void*, std::size_t) {}
void announce_write(const void*, std::size_t) {}
Unwatched::Unwatched() {}
Unwatched::~Unwatched() {}
#endif

#ifdef RESNORM_SIMT_ADDRESS_SANITIZER
void forbid(const void* at, std::size_t bytes) { __asan_poison_memory_region(at, bytes); }
#else
void forbid(const void*, std::size_t) {}
#endif

}  // namespace resnorm::simt
