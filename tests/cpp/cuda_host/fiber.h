// Threads of our own making: a stack each, all on one thread of the system, switched by hand in
// some 10 ns where a barrier of real threads takes 10 us and more. Used by scheduler.cpp only.
//
// ThreadSanitizer is told of every switch and takes each fiber for a thread; a switch orders
// nothing (no_sync). Whether it is there is found at run time, through weak symbols: scheduler.cpp
// itself must be compiled without -fsanitize=thread, or its own bookkeeping would be reported.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <new>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace cuda_host {

inline bool is_sanitized() { return __tsan_create_fiber != nullptr; }

// What happened before a release of an address happens before what follows its acquire.
inline void release(void* address) {
  if (is_sanitized()) __tsan_release(address);
}
inline void acquire(void* address) {
  if (is_sanitized()) __tsan_acquire(address);
}

// Pages from the system: ThreadSanitizer forgets what it knew of them when they are unmapped, which
// is what a new thread's stack and a new block's shared memory need.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes) {
    start_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(start_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  unsigned char* data() const { return static_cast<unsigned char*>(start_); }
  size_t bytes() const { return bytes_; }

 private:
  void* start_;
  size_t bytes_;
};

#if defined(__x86_64__)

// Saves what a function must preserve on the running stack and continues on another one.
extern "C" void ueo_fast_cuda_host_switch(void** save, void* load);
asm(R"(
.text
.local ueo_fast_cuda_host_switch
.type ueo_fast_cuda_host_switch, @function
ueo_fast_cuda_host_switch:
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
.size ueo_fast_cuda_host_switch, .-ueo_fast_cuda_host_switch
)");

class Context {
 public:
  // The next switch to this context calls `entry`, which must not return.
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);  // above six registers; below a null return address
    stack_pointer_ = frame;
  }
  static void switch_to(Context& from, Context& to) {
    ueo_fast_cuda_host_switch(&from.stack_pointer_, to.stack_pointer_);
  }

 private:
  void* stack_pointer_ = nullptr;
};

#else  // slower: a switch saves the mask of signals, by a system call

class Context {
 public:
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void switch_to(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace cuda_host
