// Runs a CUDA kernel on the host: every CUDA thread is a fiber (fiber.h), and all of them take turns
// on the calling thread, each running until it has to wait for others. The order in which threads
// and blocks come is shuffled, differently at every launch, from a seed.
//
// Barriers are happens-before edges for ThreadSanitizer between exactly the threads that meet, one
// meeting at a time; shuffles are none, as in CUDA. A wait that cannot end is found at once (no
// thread can run) and is an exception; a kernel that spins on memory would hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cuda_host {

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

// threadIdx, blockIdx, blockDim, gridDim of the running CUDA thread.
struct Position {
  Index thread;
  Index block;
  Index block_size{1, 1, 1};
  Index grid_size{1, 1, 1};
};

extern thread_local constinit const Position* current_position;  // null outside of a kernel
inline const Position& position() { return *current_position; }

struct Grid {
  unsigned blocks = 1;
  unsigned threads = 32;  // per block
  size_t shared_bytes = 0;
};

// Runs `thread` once per CUDA thread. Throws std::runtime_error for what a kernel must not do, and
// what `thread` throws. `kernel` is the address of the kernel's function, for messages.
void launch(const Grid& grid, const std::function<void()>& thread, const void* kernel = nullptr);

void set_seed(uint64_t seed);    // of the order of threads and blocks, for this thread's launches
void check(bool ok, const char* message);  // throws std::runtime_error that names the thread

// ---- Called by CUDA threads, through host_device.h -------------------------------------------
enum class Meeting { kBlock, kShuffle, kShuffleXor };

void wait_for_block();
// The value that the lane `source` of the warp brings to the same shuffle.
uint64_t exchange(Meeting kind, unsigned mask, uint64_t value, unsigned source);

unsigned char* shared_memory();

struct Copy {
  void* shared;
  const void* global;
};
void queue_copy(Copy copy);
bool next_copy(Copy& copy);  // takes the oldest out of the thread's queue, if there is one

// A fence orders what the thread did before it and its later atomics, and the block's earlier
// atomics and what follows. An atomic alone orders nothing.
void fence();
void before_atomic(void* address);

}  // namespace cuda_host
