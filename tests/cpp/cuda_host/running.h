// A launch while it runs: private to the scheduler*.cpp, which are compiled without
// -fsanitize=thread (fiber.h says why).
#pragma once

#include <array>
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "scheduler.h"

namespace cuda_host {

inline constexpr unsigned kWarp = 32;

struct Cancelled {};  // unwinds the threads of a launch that has failed

enum class State { kRunnable, kBlock, kShuffle, kShuffleXor, kFinished, kStates };
inline constexpr std::array<const char*, static_cast<size_t>(State::kStates)> kDoing = {
    "runnable", "in __syncthreads", "in __shfl_sync", "in __shfl_xor_sync", "finished"};

inline State state_of(Meeting kind) { return static_cast<State>(static_cast<int>(kind) + 1); }

struct Block;

struct Fiber {
  Context context;
  void* tsan = nullptr;
  std::unique_ptr<Pages> stack;
  Position position;
  Block* block = nullptr;
  State state = State::kRunnable;
  uint64_t value = 0;   // brought to a shuffle, then got from it
  unsigned source = 0;  // lane
  std::vector<Copy> copies;
  size_t next_copy = 0;
  bool fenced = false;

  void forget_copies() {
    copies.clear();
    next_copy = 0;
  }
};

// Where threads meet, again and again. Each meeting has a sync address of its own, or a thread that
// is already past the next one would seem ordered before a thread that has not left this one. Two
// are enough: no thread arrives at the meeting after next before all have left this one.
struct Barrier {
  unsigned arrived = 0;
  unsigned round = 0;
  char sync[2];

  void* address(unsigned of_round) { return &sync[of_round & 1]; }
};

struct WarpMeeting {  // of the lanes of one mask
  unsigned mask = 0;
  unsigned arrived = 0;  // mask
  State kind = State::kShuffle;
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber*> fibers;
  std::unique_ptr<Pages> shared;
  Barrier barrier;
  std::vector<std::array<WarpMeeting, 4>> warps;
  std::array<void*, 64> atomics{};  // addresses
  size_t atomics_count = 0;
};

class Launch {
 public:
  Launch(const Grid& grid, const std::function<void()>& thread, const void* kernel);

  void run();

  Fiber& current() { return *current_; }
  void meet_block();
  void meet_lanes(State kind, unsigned mask);
  const Grid& grid() const { return grid_; }
  [[noreturn]] void fail(const std::string& message);
  static void enter();

 private:
  void start(unsigned index);
  Fiber& take_fiber();
  void run_started();
  void retire_block();
  void forget_threads(size_t keep);
  void check_guard(const Block& block);
  void wait(State state);
  void switch_to(Context& from, Fiber* to);
  void wake(Fiber& fiber);
  template <class Visit>
  void in_any_order(unsigned count, Visit visit);
  std::string stuck() const;
  void cancel(std::exception_ptr error);
  void finish();

  const Grid grid_;
  const std::function<void()>& thread_;
  const void* kernel_;
  uint64_t random_;
  std::deque<Fiber> fibers_;
  std::vector<Fiber*> spare_fibers_;
  std::deque<void*> retired_;  // ThreadSanitizer's threads
  std::unique_ptr<Block> block_;  // that runs
  std::vector<Fiber*> queue_;  // a ring
  size_t head_ = 0;
  size_t queued_ = 0;
  size_t unfinished_ = 0;
  Fiber* current_ = nullptr;
  Context main_;
  void* main_tsan_ = nullptr;
  std::exception_ptr error_;
  char end_ = 0;  // the sync address of the launch's end
};

// 0..count-1 from a random start in a random direction.
template <class Visit>
void Launch::in_any_order(unsigned count, Visit visit) {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const unsigned start = static_cast<unsigned>(random_ >> 32) % count;
  if ((random_ & 1) != 0) {
    for (unsigned at = start; at < count; ++at) visit(at);
    for (unsigned at = 0; at < start; ++at) visit(at);
  } else {
    for (unsigned at = start; at-- > 0;) visit(at);
    for (unsigned at = count; at-- > start;) visit(at);
  }
}

extern thread_local constinit Launch* active;  // of this thread of the system

std::string kernel_name(const void* kernel);
std::string plural(unsigned n, const char* what);

}  // namespace cuda_host
