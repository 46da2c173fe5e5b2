// What CUDA threads call.
#include <algorithm>

#include "running.h"

namespace cuda_host {

void check(bool ok, const char* message) {
  if (!ok) active->fail(message);
}

void wait_for_block() {
  active->meet_block();
}

uint64_t exchange(Meeting kind, unsigned mask, uint64_t value, unsigned source) {
  Fiber& fiber = active->current();
  const unsigned base = fiber.position.thread.x / kWarp * kWarp;
  check(base + source < active->grid().threads && (mask >> source & 1) != 0,
        "shuffles from a lane that does not take part");
  fiber.value = value;
  fiber.source = source;
  active->meet_lanes(state_of(kind), mask);
  return fiber.value;
}

unsigned char* shared_memory() { return active->current().block->shared->data(); }

void queue_copy(Copy copy) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  check(address(copy.shared) % 16 == 0, "an asynchronous copy's target is not aligned to 16 bytes");
  check(address(copy.global) % 16 == 0, "an asynchronous copy's source is not aligned to 16 bytes");
  const uintptr_t offset = address(copy.shared) - address(shared_memory());
  check(offset <= active->grid().shared_bytes && active->grid().shared_bytes - offset >= 16,
        "an asynchronous copy's target is not in the block's shared memory");
  active->current().copies.push_back(copy);
}

bool next_copy(Copy& copy) {
  Fiber& fiber = active->current();
  if (fiber.next_copy < fiber.copies.size()) {
    copy = fiber.copies[fiber.next_copy++];
    return true;
  }
  fiber.forget_copies();
  return false;
}

void fence() {
  Fiber& fiber = active->current();
  fiber.fenced = true;
  for (size_t i = 0; i < fiber.block->atomics_count; ++i) acquire(fiber.block->atomics[i]);
}

void before_atomic(void* address) {
  Fiber& fiber = active->current();
  Block& block = *fiber.block;
  if (fiber.fenced) release(address);
  auto* end = block.atomics.begin() + block.atomics_count;
  if (std::find(block.atomics.begin(), end, address) != end) return;
  check(block.atomics_count < block.atomics.size(), "uses more atomics than this shim keeps");
  block.atomics[block.atomics_count++] = address;
}

}  // namespace cuda_host
