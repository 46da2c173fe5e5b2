// How the threads of a launch take turns, and its blocks come and go.
#include "scheduler.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>

#include "running.h"

namespace cuda_host {

thread_local constinit const Position* current_position = nullptr;
thread_local constinit Launch* active = nullptr;

namespace {

constexpr size_t kStackBytes = 96 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kGuardBytes = 4096;  // after a block's shared memory
constexpr unsigned char kGuard = 0xA5;
constexpr unsigned char kPoison = 0xFF;  // floats and halves of these bytes are NaN
constexpr size_t kRetiredThreads = 4096;  // of the 8,128 that ThreadSanitizer knows

thread_local std::mt19937_64 random_order{0};
thread_local std::vector<std::unique_ptr<Pages>> spare_stacks;

}  // namespace

std::string plural(unsigned n, const char* what) {
  return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (kernel == nullptr || dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* plain = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? plain : info.dli_sname;
  std::free(plain);
  return name;
}

Launch::Launch(const Grid& grid, const std::function<void()>& thread, const void* kernel)
    : grid_(grid), thread_(thread), kernel_(kernel), random_(random_order()) {}

// ---- Taking turns ----------------------------------------------------------------------------

void Launch::wake(Fiber& fiber) {
  fiber.state = State::kRunnable;
  queue_[(head_ + queued_++) % queue_.size()] = &fiber;
}

void Launch::switch_to(Context& from, Fiber* to) {
  current_ = to;
  current_position = to == nullptr ? nullptr : &to->position;
  if (is_sanitized()) __tsan_switch_to_fiber(to == nullptr ? main_tsan_ : to->tsan, 1);
  Context::switch_to(from, to == nullptr ? main_ : to->context);
}

// Lets others run until somebody wakes this thread.
void Launch::wait(State state) {
  Fiber& fiber = *current_;
  fiber.state = state;
  Fiber* next = nullptr;
  if (queued_ > 0) {
    next = queue_[head_];
    head_ = (head_ + 1) % queue_.size();
    --queued_;
  }
  if (next != &fiber) switch_to(fiber.context, next);
  if (state != State::kFinished && error_) throw Cancelled{};
}

void Launch::enter() {
  Launch& launch = *active;
  try {
    if (!launch.error_) launch.thread_();
    check(launch.current_->next_copy == launch.current_->copies.size(),
          "exits with asynchronous copies for which it has not waited");
  } catch (const Cancelled&) {
  } catch (...) {
    launch.cancel(std::current_exception());
  }
  launch.finish();
}

void Launch::finish() {
  release(&end_);
  --unfinished_;
  wait(State::kFinished);
}

void Launch::cancel(std::exception_ptr error) {
  if (!error_) error_ = error;
  for (Fiber& fiber : fibers_) {
    if (fiber.state != State::kRunnable && fiber.state != State::kFinished) wake(fiber);
  }
}

void Launch::fail(const std::string& message) {
  const Position& at = current_->position;
  throw std::runtime_error(kernel_name(kernel_) + ", block " + std::to_string(at.block.x) +
                           ", thread " + std::to_string(at.thread.x) + ": " + message);
}

// ---- Blocks ----------------------------------------------------------------------------------

Fiber& Launch::take_fiber() {
  if (!spare_fibers_.empty()) {
    Fiber& fiber = *spare_fibers_.back();
    spare_fibers_.pop_back();
    return fiber;
  }
  Fiber& fiber = fibers_.emplace_back();
  if (!spare_stacks.empty()) {
    fiber.stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
  } else {
    fiber.stack = std::make_unique<Pages>(kStackBytes);
    mprotect(fiber.stack->data(), kPage, PROT_NONE);  // an overflow ends the process
  }
  return fiber;
}

void Launch::start(unsigned index) {
  // In memory of its own, of which ThreadSanitizer knows nothing: at the address of another block's
  // barrier this one would seem to go on from that.
  block_ = std::make_unique<Block>();
  Block& block = *block_;
  block.index = index;
  block.shared = std::make_unique<Pages>(grid_.shared_bytes + kGuardBytes);
  unsigned char* shared = block.shared->data();
  std::fill(shared, shared + grid_.shared_bytes, kPoison);
  std::fill(shared + grid_.shared_bytes, shared + grid_.shared_bytes + kGuardBytes, kGuard);
  block.warps.resize((grid_.threads + kWarp - 1) / kWarp);
  block.fibers.resize(grid_.threads);
  for (unsigned t = 0; t < grid_.threads; ++t) {
    Fiber& fiber = take_fiber();
    block.fibers[t] = &fiber;
    fiber.position = {{t}, {index}, {grid_.threads, 1, 1}, {grid_.blocks, 1, 1}};
    fiber.block = &block;
    fiber.forget_copies();
    fiber.fenced = false;
    if (is_sanitized()) fiber.tsan = __tsan_create_fiber(0);
    // Tops at different distances from their pages: or all of them would share few lines of cache.
    fiber.context.start(fiber.stack->data(), kStackBytes - t % 64 * 320, &Launch::enter);
  }
  in_any_order(grid_.threads, [&](unsigned t) { wake(*block.fibers[t]); });
  unfinished_ += grid_.threads;
}

void Launch::check_guard(const Block& block) {
  const unsigned char* guard = block.shared->data() + grid_.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] != kGuard) {
      throw std::runtime_error(kernel_name(kernel_) + ", block " + std::to_string(block.index) +
                               ": byte " + std::to_string(i) + " after the block's " +
                               std::to_string(grid_.shared_bytes) +
                               " bytes of shared memory was overwritten");
    }
  }
}

// Runs what has been started to its end.
void Launch::run_started() {
  while (unfinished_ > 0) {
    if (queued_ == 0) {
      cancel(std::make_exception_ptr(std::runtime_error(stuck())));
    }
    Fiber* next = queue_[head_];
    head_ = (head_ + 1) % queue_.size();
    --queued_;
    switch_to(main_, next);
  }
}

// Hands the threads of a block that has ended over to the next one. Not under ThreadSanitizer:
// there a thread of its own for every CUDA thread lets it see races between blocks.
void Launch::retire_block() {
  if (!error_) check_guard(*block_);
  for (Fiber* fiber : block_->fibers) {
    if (is_sanitized()) {
      retired_.push_back(fiber->tsan);
      fiber->stack.reset();
    } else {
      spare_fibers_.push_back(fiber);
    }
  }
  block_.reset();
  forget_threads(kRetiredThreads);
}

// ThreadSanitizer gives the number of a destroyed thread to a new one and would take their accesses
// for one thread's: as many as possible are kept until the launch has ended.
void Launch::forget_threads(size_t keep) {
  for (; retired_.size() > keep; retired_.pop_front()) __tsan_destroy_fiber(retired_.front());
}

void Launch::run() {
  queue_.resize(grid_.threads);
  if (is_sanitized()) main_tsan_ = __tsan_get_current_fiber();
  std::vector<unsigned> order(grid_.blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937_64 random(random_);
  std::shuffle(order.begin(), order.end(), random);
  random_ |= 1;  // xorshift needs a bit
  for (unsigned index : order) {
    start(index);
    run_started();
    retire_block();
    if (error_) break;
  }
  acquire(&end_);
  forget_threads(0);
  for (Fiber* fiber : spare_fibers_) spare_stacks.push_back(std::move(fiber->stack));
  if (error_) std::rethrow_exception(error_);
}

// ---- The interface ---------------------------------------------------------------------------

void launch(const Grid& grid, const std::function<void()>& thread, const void* kernel) {
  if (active != nullptr) throw std::logic_error("a kernel cannot launch kernels");
  if (grid.blocks == 0 || grid.threads == 0 || grid.threads > 1024) {
    throw std::runtime_error(kernel_name(kernel) + ": cannot launch " +
                             plural(grid.blocks, "block") + " of " + plural(grid.threads, "thread"));
  }
  Launch running(grid, thread, kernel);
  active = &running;
  struct Reset {
    ~Reset() { active = nullptr; }
  } reset;
  running.run();
}

void set_seed(uint64_t seed) { random_order.seed(seed); }

}  // namespace cuda_host
