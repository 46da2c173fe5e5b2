// Barriers and shuffles: who waits for whom.
#include <algorithm>

#include "running.h"

namespace cuda_host {

void Launch::meet_block() {
  if (error_) throw Cancelled{};
  Barrier& barrier = block_->barrier;
  void* sync = barrier.address(barrier.round);
  release(sync);
  if (++barrier.arrived < grid_.threads) {
    wait(State::kBlock);
  } else {
    barrier.arrived = 0;
    ++barrier.round;
    in_any_order(grid_.threads, [&](unsigned thread) {
      if (block_->fibers[thread] != current_) wake(*block_->fibers[thread]);
    });
  }
  acquire(sync);
}

void Launch::meet_lanes(State kind, unsigned mask) {
  if (error_) throw Cancelled{};
  Fiber& self = *current_;
  Fiber** warp = &self.block->fibers[self.position.thread.x / kWarp * kWarp];
  const unsigned lanes = std::min(kWarp, grid_.threads - self.position.thread.x / kWarp * kWarp);
  const unsigned me = 1u << (self.position.thread.x % kWarp);
  mask &= lanes == kWarp ? ~0u : (1u << lanes) - 1;
  if ((mask & me) == 0) fail("the mask of a warp's meeting lacks the lane that comes to it");
  auto& all = self.block->warps[self.position.thread.x / kWarp];
  auto* group = std::find_if(all.begin(), all.end(), [mask](const WarpMeeting& candidate) {
    return candidate.mask == mask || candidate.mask == 0;
  });
  if (group == all.end()) fail("meets its warp under more masks than this shim keeps");
  group->mask = mask;
  if (group->arrived != 0 && group->kind != kind) {
    fail(std::string("comes to a meeting ") + kDoing[static_cast<size_t>(kind)] +
         " while other lanes of its mask are " + kDoing[static_cast<size_t>(group->kind)]);
  }
  group->kind = kind;
  group->arrived |= me;
  if (group->arrived != mask) {
    wait(kind);
  } else {
    group->arrived = 0;
    uint64_t values[kWarp];
    for (unsigned lane = 0; lane < lanes; ++lane) values[lane] = warp[lane]->value;
    in_any_order(lanes, [&](unsigned lane) {
      if ((mask >> lane & 1) == 0) return;
      warp[lane]->value = values[warp[lane]->source];
      if (warp[lane] != &self) wake(*warp[lane]);
    });
  }
}

std::string Launch::stuck() const {
  std::string text = kernel_name(kernel_) + " cannot go on, not all threads reach a barrier: block " +
                     std::to_string(block_->index) + ":";
  unsigned count[static_cast<size_t>(State::kStates)] = {};
  unsigned first[static_cast<size_t>(State::kStates)] = {};
  for (unsigned t = grid_.threads; t-- > 0;) {
    const auto state = static_cast<size_t>(block_->fibers[t]->state);
    ++count[state];
    first[state] = t;
  }
  for (size_t state = 0; state < static_cast<size_t>(State::kStates); ++state) {
    if (count[state] == 0) continue;
    text += " " + plural(count[state], "thread") + " " + kDoing[state] + " (first: " +
            std::to_string(first[state]) + ")";
  }
  return text;
}

}  // namespace cuda_host
