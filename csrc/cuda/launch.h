// Every tuning number of the CUDA kernels, each with its reason, and the arithmetic that turns a
// shape and a device into launches. Plain C++: tests run it for devices that they make up.
//
// No number here has been tuned on a GPU yet: they follow from the counting given beside them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ueo_fast::cuda {

// ---- Budgets of the compiled kernels; tests/test_cuda_ahead_of_time.py reads them ---------------
// 1,024 threads share the 65,536 registers of a multiprocessor.
inline constexpr int kMaxRegisters = 64;
// The one-pass kernel runs one block of 512 threads per multiprocessor, and so do blocks that
// compute in double.
inline constexpr int kMaxRegistersOnePass = 128;
// Local memory per thread, spills included.
inline constexpr int kMaxStackBytes = 0;
// All shared memory is dynamic and part of the plan below.
inline constexpr int kMaxStaticSharedBytes = 0;

namespace tuning {

// Threads of a block in which rows go to a warp or a part of one. Eight warps give the scheduler
// something to do while a row arrives, and their column sums still leave room for four blocks.
inline constexpr int kLaneTeamThreads = 256;

// Slots (16 bytes) of a row per lane, at most, before more lanes share it: enough loads in flight
// per lane to cover memory's latency, few enough that a reduction serves many elements.
inline constexpr int kSlotsPerLane = 4;

// Rows of more slots than this go to a whole block: a warp would have to hold 4 KiB in flight.
inline constexpr int kLaneTeamMaxSlots = 256;

// Threads of a block that shares one row, and how many slots each should have.
inline constexpr int kBlockTeamMinThreads = 128;
inline constexpr int kBlockTeamMaxThreads = 1024;
inline constexpr int kBlockTeamMaxThreadsDouble = 512;
inline constexpr int kBlockTeamSlotsPerThread = 8;

// Threads that a multiprocessor should have at least where shared memory lets it: half of them.
inline constexpr int kWantedThreads = 1024;

// Additions that meet in one float before a column sum is stored and goes on in double.
inline constexpr int kRowsPerSum = 128;

// The one-pass kernel: one block per multiprocessor, so that nothing but its rows takes shared
// memory. 512 threads of 128 registers, 32 of which hold rows: another 64 KiB of them. Arithmetic in
// double needs those itself.
inline constexpr int kOnePassThreads = 512;
inline constexpr int kHeldSlots = 8;
// Rows of a block, at least: every further block makes the grid's wait for itself longer.
inline constexpr int kOnePassMinRows = 4;
// Groups in which a block's rows arrive; while one is worked on, the next ones are under way.
inline constexpr int kArrivals = 3;

// Columns per block of the marginal kernel: a warp reads 128 adjacent bytes of a partial sum. The
// other threads share the partial sums.
inline constexpr int kMarginalColumns = 32;
inline constexpr int kMarginalThreads = 512;

// Up to here every block looks for the largest given weight itself (a few microseconds of reading
// from the L2); above, a launch of its own does it once.
inline constexpr int64_t kScanRows = 4096;
inline constexpr int kScanThreads = 1024;

// Part of the L2 beyond which a gradient is stored past it: it would evict logits that are still
// to be read, and be evicted before anybody reads it.
inline constexpr double kStreamShareOfL2 = 0.5;

// What the system keeps of a multiprocessor's shared memory for each block.
inline constexpr int64_t kReservedShared = 1024;

}  // namespace tuning

// What a launch needs to know of a GPU.
struct Device {
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_per_block;           // with the opt-in
  int64_t shared_per_multiprocessor;
  int64_t l2_bytes;
  bool cooperative;                   // whether a grid can wait for all of its blocks
};

struct Grid {
  int blocks;
  int threads;           // per block
  int64_t shared_bytes;  // per block
  bool cooperative = false;
};

// A row as 16-byte slots of aligned memory (rows.cuh).
struct RowShape {
  int columns;
  int per_slot;       // elements
  int slots;          // at most, wherever the row starts
  int compute_bytes;  // of float or double

  RowShape(int64_t columns_, int element_bytes)
      : columns(static_cast<int>(columns_)),
        per_slot(16 / element_bytes),
        slots((columns + 2 * per_slot - 2) / per_slot),
        compute_bytes(element_bytes == 8 ? 8 : 4) {}

  int64_t row_bytes() const { return int64_t{16} * slots; }
  // One number of the compute type per element of the slots: column sums, log q.
  int64_t column_bytes() const { return int64_t{slots} * per_slot * compute_bytes; }
};

// How rows are shared out. Row b + blocks * (team + teams * step) goes to a team of block b: as
// `blocks` is a multiple of the elements per slot, all rows of a block start at the same offset
// from a 16-byte boundary, and a thread owns the same columns in each of them.
struct RowPlan {
  Grid grid;
  bool block_team;       // one row to a whole block
  int lanes;             // threads of a team
  int teams;             // per block
  int64_t steps;         // rows per team, at most
  int cached;            // slots of a row that stay in shared memory between its sweeps
  bool columns_shared;   // whether the numbers per column are in shared memory
};

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch of block-wide reductions: two turns of 32 warps of 4 doubles (team.cuh).
inline constexpr int64_t kScratchBytes = 2 * 32 * 4 * 8;

// Numbers per column that a kernel keeps: one set for a block (log q), one for each team (sums), or
// none, where a row is read only once and need not wait either.
enum class PerColumn { kNone, kPerBlock, kPerTeam };

inline RowPlan plan_rows(const Device& device, const RowShape& row, int64_t rows,
                         PerColumn per_column) {
  RowPlan plan{};
  plan.block_team = row.slots > tuning::kLaneTeamMaxSlots;
  plan.cached = per_column == PerColumn::kNone ? 0 : row.slots;
  plan.columns_shared = true;
  if (!plan.block_team) {
    plan.grid.threads = tuning::kLaneTeamThreads;
    plan.lanes = std::min(32, power_of_two_from(divide_up(row.slots, tuning::kSlotsPerLane)));
    plan.teams = plan.grid.threads / plan.lanes;
  } else {
    plan.teams = 1;
  }
  const int64_t room = device.shared_per_block - kScratchBytes;
  const int sets = per_column == PerColumn::kNone       ? 0
                   : per_column == PerColumn::kPerBlock ? 1
                                                        : plan.teams;
  const int64_t column_bytes = row.column_bytes() * sets;
  int64_t used = column_bytes + int64_t{16} * plan.teams * plan.cached;
  if (used > room) {  // numbers per column first: a row can be read again, from the L2
    plan.columns_shared = column_bytes <= room;
    const int64_t left = room - (plan.columns_shared ? column_bytes : 0);
    plan.cached = static_cast<int>(std::min<int64_t>(row.slots, left / (16 * plan.teams)));
    used = (plan.columns_shared ? column_bytes : 0) + int64_t{16} * plan.teams * plan.cached;
  }
  plan.grid.shared_bytes = kScratchBytes + used;
  const int by_shared = static_cast<int>(std::max<int64_t>(
      1, device.shared_per_multiprocessor / (plan.grid.shared_bytes + tuning::kReservedShared)));
  if (plan.block_team) {
    const int most = row.compute_bytes == 8 ? tuning::kBlockTeamMaxThreadsDouble
                                            : tuning::kBlockTeamMaxThreads;
    const int wanted = static_cast<int>(
        std::max(divide_up(row.slots, tuning::kBlockTeamSlotsPerThread),
                 divide_up(tuning::kWantedThreads, by_shared)));
    plan.grid.threads = std::clamp((wanted + 31) / 32 * 32, tuning::kBlockTeamMinThreads, most);
    plan.lanes = plan.grid.threads;
  }
  const int registers = row.compute_bytes == 8 ? kMaxRegistersOnePass : kMaxRegisters;
  const int by_threads = device.threads_per_multiprocessor / plan.grid.threads;
  const int by_registers = 65536 / (registers * plan.grid.threads);
  const int resident = std::max(1, std::min({by_shared, by_threads, by_registers}));
  const int64_t most = std::min<int64_t>(int64_t{resident} * device.multiprocessors,
                                         divide_up(rows, plan.teams));
  plan.grid.blocks = static_cast<int>(
      std::max<int64_t>(row.per_slot, most / row.per_slot * row.per_slot));
  plan.steps = divide_up(rows, int64_t{plan.grid.blocks} * plan.teams);
  return plan;
}

// Rows of column sums that the statistics kernel leaves behind: block b writes rows b + blocks * k.
inline int64_t partial_sums_of(const RowPlan& plan) {
  return plan.grid.blocks * divide_up(plan.steps, tuning::kRowsPerSum);
}

inline int marginal_tiles(const RowShape& row) {
  return static_cast<int>(divide_up(row.columns, tuning::kMarginalColumns));
}

// The one-pass kernel: every row of block b (rows b + blocks * i) stays on the chip.
struct OnePassPlan {
  bool fits = false;
  Grid grid{};
  bool block_team = false;
  int lanes = 0;
  int teams = 0;
  int shared_rows = 0;      // per block: in shared memory
  int held_rows = 0;        // per team: in registers, after the shared ones
  int rows_per_block = 0;   // at most
  int sum_groups = 0;       // groups of threads that share the rows of a column
};

inline OnePassPlan plan_one_pass(const Device& device, const RowShape& row, int64_t rows) {
  OnePassPlan plan;
  const int threads = tuning::kOnePassThreads;
  plan.block_team = row.slots > tuning::kLaneTeamMaxSlots;
  plan.lanes = plan.block_team
                   ? threads
                   : std::min(32, power_of_two_from(divide_up(row.slots, tuning::kSlotsPerLane)));
  plan.teams = threads / plan.lanes;
  const int64_t most =
      std::min<int64_t>(device.multiprocessors, divide_up(rows, tuning::kOnePassMinRows));
  const int64_t blocks = std::max<int64_t>(row.per_slot, most / row.per_slot * row.per_slot);
  if (!device.cooperative || blocks > device.multiprocessors) return plan;
  const int64_t rows_per_block = divide_up(rows, blocks);
  // A row takes as many of a thread's held slots as it has slots per lane.
  const int held = plan.block_team || row.compute_bytes == 8
                       ? 0
                       : static_cast<int>(tuning::kHeldSlots / divide_up(row.slots, plan.lanes));
  plan.sum_groups = static_cast<int>(std::max(1, threads / row.slots));
  const int64_t columns = row.column_bytes() * plan.sum_groups;
  const int64_t statistics = 5 * row.compute_bytes;
  const int64_t scratch = kScratchBytes + threads * 8;  // a double each for the marginal
  int64_t room = device.shared_per_block - scratch - columns - rows_per_block * statistics;
  if (room < 0) return plan;
  const int64_t shared_rows = std::min(rows_per_block, room / row.row_bytes());
  const int64_t held_rows = divide_up(rows_per_block - shared_rows, plan.teams);
  // Rows pass through shared memory on their way to registers.
  if (held_rows > held || held_rows * plan.teams > shared_rows) return plan;
  plan.fits = true;
  plan.shared_rows = static_cast<int>(shared_rows);
  plan.held_rows = static_cast<int>(held_rows);
  plan.rows_per_block = static_cast<int>(rows_per_block);
  plan.grid = {static_cast<int>(blocks), threads,
               scratch + columns + rows_per_block * statistics + shared_rows * row.row_bytes(), true};
  return plan;
}

}  // namespace ueo_fast::cuda
