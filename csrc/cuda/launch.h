// Tuning numbers of the loss's kernels, each with its reason; affine_launch.h has those of the affine
// kernels. Also the arithmetic that turns a shape and a device into launches. Plain C++: tests run it
// for invented devices.
//
// The numbers of the kernels for rows in registers were measured on a GPU (docs/performance.md, "What
// was tried"); the others follow from the calculations given with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace ueo_fast::cuda {

// ---- Budgets of the compiled kernels; tests/cuda/test_cuda_ahead_of_time.py reads them ---------------
// 1,024 threads share the 65,536 registers of a multiprocessor. What kernels that hold rows in
// registers may use follows from register_blocks().
inline constexpr int kMaxRegisters = 64;
// Blocks that compute in double, and affine gradients with many sums.
inline constexpr int kMaxRegistersWide = 128;
// Local memory per thread, spills included.
inline constexpr int kMaxStackBytes = 0;
// All shared memory is dynamic and part of the plan below.
inline constexpr int kMaxStaticSharedBytes = 0;

// Instruction budgets per row, over all warps that work on it, for the row loops of the plain kernels
// (nvcc 13.0, sm_90). The target was 110% of a prototype's count: 317, 229, 674 and 592 for the
// statistics in the order below, 367, 319, 955 and 842 for the gradient. The gradients meet it. The
// statistics loop also contains code that runs once per 16 or 32 rows, or only for rows at unaligned
// ends, so its length exceeds the instructions executed per row (docs/performance.md, counters). A
// budget is 105% of the count, or the target if that is lower.
struct LoopBudget {
  const char* kernel;
  const char* storage;
  int columns;
  int instructions;
};
inline constexpr LoopBudget kLoopBudgets[] = {
    {"ueo_statistics", "float", 345, 469},
    {"ueo_statistics", "__nv_bfloat16", 345, 279},
    {"ueo_statistics", "float", 1000, 765},
    {"ueo_statistics", "__nv_bfloat16", 1000, 659},
    {"ueo_gradient", "float", 345, 367},
    {"ueo_gradient", "__nv_bfloat16", 345, 285},
    {"ueo_gradient", "float", 1000, 695},
    {"ueo_gradient", "__nv_bfloat16", 1000, 684},
    {"ueo_statistics_block", "float", 21841, 28014},
    {"ueo_statistics_block", "__nv_bfloat16", 21841, 23172},
    {"ueo_gradient_block", "float", 21841, 30541},
    {"ueo_gradient_block", "__nv_bfloat16", 21841, 28074},
};

namespace tuning {

// Threads of a block in which rows go to a warp or a part of one. Eight warps give the scheduler
// something to do while a row arrives, and their column sums still leave room for four blocks.
inline constexpr int kLaneTeamThreads = 256;

// Slots (16 bytes) of a row per lane, at most, before more lanes share it: enough loads in flight
// per lane to cover memory's latency, few enough that a reduction serves many elements.
inline constexpr int kSlotsPerLane = 4;

// Slots that a thread loads together where a row is read once, as it comes (rows.cuh, StreamedRow).
inline constexpr int kStreamedSlots = 4;

// Rows of more slots than this go to a whole block: a warp would have to hold 4 KiB in flight.
inline constexpr int kLaneTeamMaxSlots = 256;

// Threads of a block that shares one row, and how many slots each should have.
inline constexpr int kBlockTeamMinThreads = 128;
inline constexpr int kBlockTeamMaxThreads = 1024;
inline constexpr int kBlockTeamMaxThreadsDouble = 512;
inline constexpr int kBlockTeamSlotsPerThread = 8;

// Threads that a multiprocessor should have at least where shared memory lets it: half of them.
inline constexpr int kWantedThreads = 1024;

// Additions in one float before a column sum is stored and continues in double.
inline constexpr int kRowsPerSum = 128;

// Threads of a block whose rows are in registers (ueo_loss.cuh), and those of one that shares a row
// (ueo_loss_block.cuh), at most.
inline constexpr int kRegisterThreads = 256;
inline constexpr int kSharedRowThreads = 1024;

// Adjacent columns per thread of the marginal kernel: 16 bytes of floats. If a single block of
// kMarginalThreads would have at most kPiecesAlone such pieces per thread, it works alone and waits
// for no other block. Otherwise tiles are sized to give each multiprocessor one.
inline constexpr int kPieceColumns = 4;
inline constexpr int kPiecesAlone = 8;
inline constexpr int kMarginalThreads = 1024;
inline constexpr int kMarginalTileThreads = 256;

// Up to this many rows, every block finds the largest given weight by itself (a few microseconds of
// reading from the L2); beyond, the blocks of a separate launch share the work.
inline constexpr int64_t kScanRows = 4096;
inline constexpr int kScanThreads = 1024;
inline constexpr int kMostScanBlocks = 64;

// Part of the L2 beyond which a gradient is stored past it: it would evict logits still to
// be read, and be evicted before it is read.
inline constexpr double kStreamShareOfL2 = 0.5;

// What the system keeps of a multiprocessor's shared memory for each block.
inline constexpr int64_t kReservedShared = 1024;

}  // namespace tuning

// What a launch needs to know about a GPU.
struct Device {
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_per_block;           // with the opt-in
  int64_t shared_per_multiprocessor;
  int64_t l2_bytes;
};

struct Grid {
  int blocks;
  int threads;               // per block
  int64_t shared_bytes;      // per block
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

// As many blocks as there is room for, or as have a row; a multiple of the elements per slot.
inline int blocks_for(const RowShape& row, int64_t resident, int64_t with_rows) {
  const int64_t most = std::min(resident, with_rows);
  return static_cast<int>(std::max<int64_t>(row.per_slot, most / row.per_slot * row.per_slot));
}

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
  const int registers = row.compute_bytes == 8 ? kMaxRegistersWide : kMaxRegisters;
  const int by_threads = device.threads_per_multiprocessor / plan.grid.threads;
  const int by_registers = 65536 / (registers * plan.grid.threads);
  const int resident = std::max(1, std::min({by_shared, by_threads, by_registers}));
  plan.grid.blocks =
      blocks_for(row, int64_t{resident} * device.multiprocessors, divide_up(rows, plan.teams));
  plan.steps = divide_up(rows, int64_t{plan.grid.blocks} * plan.teams);
  return plan;
}

// Rows of column sums that a kernel leaves behind: block b writes rows b + blocks * k.
inline int64_t partial_sums_of(int blocks, int64_t steps) {
  return blocks * divide_up(steps, tuning::kRowsPerSum);
}

// Column sums of a block: rows of this many numbers, so that each starts at 16 bytes.
inline int64_t column_stride(int columns) {
  return divide_up(columns, tuning::kPieceColumns) * tuning::kPieceColumns;
}

struct MarginalPlan {
  int tile_lanes;  // threads for the columns of a tile
  Grid grid;
};

inline MarginalPlan plan_marginal(const Device& device, int columns, int64_t partials) {
  const int64_t pieces = column_stride(columns) / tuning::kPieceColumns;
  const bool alone = partials * pieces <= tuning::kPiecesAlone * tuning::kMarginalThreads;
  const int threads = alone ? tuning::kMarginalThreads : tuning::kMarginalTileThreads;
  const int wanted = alone ? 1 : device.multiprocessors;
  const int lanes = std::min(threads, power_of_two_from(divide_up(pieces, wanted)));
  const int blocks = alone ? 1 : static_cast<int>(divide_up(pieces, lanes));
  return {lanes,
          {blocks, threads, kScratchBytes + int64_t{8} * threads * tuning::kPieceColumns}};
}

inline Grid scan_grid(int64_t rows) {
  return {static_cast<int>(std::min<int64_t>(divide_up(rows, 4 * tuning::kScanThreads),
                                             tuning::kMostScanBlocks)),
          tuning::kScanThreads, kScratchBytes};
}

// ---- Rows in registers ---------------------------------------------------------------------------
// There is one kernel for each way to share a row: `lanes` threads hold `slots` slots each.
struct RegisterShape {
  int lanes;
  int slots;
};

// From the shortest rows to the longest.
template <int kElementBytes>
inline constexpr RegisterShape kRegisterShapes[1] = {};
template <>
inline constexpr RegisterShape kRegisterShapes<4>[] = {{8, 1},  {8, 2},  {8, 4},  {16, 4},
                                                       {32, 3}, {32, 4}, {32, 6}, {32, 8}};
template <>
inline constexpr RegisterShape kRegisterShapes<2>[] = {{8, 1},  {8, 2},  {16, 2}, {16, 3},
                                                       {16, 4}, {32, 3}, {32, 4}};

// Slots that every lane holds of every row that goes to this shape, because a row with fewer would
// go to the one before it.
template <int kElementBytes>
constexpr int slots_for_sure(int lanes, int slots) {
  int before = 0;
  for (const RegisterShape& shape : kRegisterShapes<kElementBytes>) {
    if (shape.lanes == lanes && shape.slots == slots) return before / lanes;
    before = shape.lanes * shape.slots;
  }
  return 0;
}

// The elements that a lane holds decide how many registers it needs, and so how many blocks fit on a
// multiprocessor; options take some more registers. 16 warps with 2 KiB in flight each hide the
// memory's latency.
constexpr int register_blocks(int elements, bool plain) {
  const int needed = elements + (plain ? 0 : 8);
  return needed <= 4 ? 4 : needed <= 16 ? 3 : needed <= 32 ? 2 : 1;
}

struct RegisterPlan {
  bool fits = false;
  int shape = 0;      // of kRegisterShapes; which is:
  int lanes = 0;
  int slots = 0;
  int teams = 0;      // per block
  int64_t steps = 0;  // rows per team, at most
  Grid grid{};
};

inline constexpr int64_t kBlockTotalsBytes = 32;  // of a block's rows
inline constexpr int64_t kEdgesBytes = 64;        // held_rows.cuh, Edges
// Of a block's teams, of 8 lanes at least.
inline constexpr int64_t kTeamTotalsBytes = tuning::kRegisterThreads / 8 * 3 * 8;

template <int kElementBytes>
RegisterPlan plan_registers(const Device& device, const RowShape& row, int64_t rows, bool plain,
                            bool sums_per_team) {
  RegisterPlan plan;
  // Kernels number rows in 32 bits, with room for one step more.
  if (kElementBytes == 8 || rows >= int64_t{1} << 31) return plan;
  const auto& shapes = kRegisterShapes<kElementBytes>;
  const int count = static_cast<int>(std::size(shapes));
  while (plan.shape < count && row.slots > shapes[plan.shape].lanes * shapes[plan.shape].slots) {
    ++plan.shape;
  }
  plan.fits = plan.shape < count;
  if (!plan.fits) return plan;
  plan.lanes = shapes[plan.shape].lanes;
  plan.slots = shapes[plan.shape].slots;
  plan.teams = tuning::kRegisterThreads / plan.lanes;
  plan.grid.threads = tuning::kRegisterThreads;
  const int elements = plan.slots * row.per_slot;
  const int64_t numbers = int64_t{elements} * plan.lanes * (sums_per_team ? plan.teams : 1);
  plan.grid.shared_bytes = kScratchBytes + kEdgesBytes + kTeamTotalsBytes + 4 * numbers;
  const int64_t by_registers = register_blocks(elements, plain);
  const int64_t by_shared =
      device.shared_per_multiprocessor / (plan.grid.shared_bytes + tuning::kReservedShared);
  const int64_t by_threads = device.threads_per_multiprocessor / plan.grid.threads;
  const int64_t resident = std::max<int64_t>(1, std::min({by_registers, by_shared, by_threads}));
  plan.grid.blocks =
      blocks_for(row, resident * device.multiprocessors, divide_up(rows, plan.teams));
  plan.steps = divide_up(rows, int64_t{plan.grid.blocks} * plan.teams);
  return plan;
}

// ---- Rows that a block shares, in registers and, while they arrive, in shared memory ------------
// Slots of a thread: 16 elements, or 24 where 1,024 threads would not do.
template <int kElementBytes>
inline constexpr int kFewSlots = 16 * kElementBytes / 16;
template <int kElementBytes>
inline constexpr int kManySlots = 24 * kElementBytes / 16;

struct SharedRowPlan {
  bool fits = false;
  bool many = false;  // kManySlots
  int slots = 0;      // per thread
  int64_t steps = 0;  // rows per block, at most
  Grid grid{};
};

template <int kElementBytes>
SharedRowPlan plan_shared_rows(const Device& device, const RowShape& row, int64_t rows) {
  SharedRowPlan plan;
  if constexpr (kElementBytes < 8) {
    constexpr int kMost = tuning::kSharedRowThreads;
    plan.many = row.slots > kMost * kFewSlots<kElementBytes>;
    plan.slots = plan.many ? kManySlots<kElementBytes> : kFewSlots<kElementBytes>;
    // The next row, and a number per column: a sum or log q.
    plan.grid.shared_bytes =
        kScratchBytes + kBlockTotalsBytes + row.row_bytes() + row.column_bytes();
    plan.fits = row.slots <= kMost * plan.slots && rows < int64_t{1} << 31 &&
                plan.grid.shared_bytes <= device.shared_per_block;
    if (!plan.fits) return plan;
    plan.grid.threads = static_cast<int>(divide_up(divide_up(row.slots, plan.slots), 32) * 32);
    const int64_t by_shared =
        device.shared_per_multiprocessor / (plan.grid.shared_bytes + tuning::kReservedShared);
    const int64_t by_threads = device.threads_per_multiprocessor / plan.grid.threads;
    const int64_t by_registers = 65536 / (kMaxRegisters * plan.grid.threads);
    const int64_t resident = std::max<int64_t>(1, std::min({by_registers, by_shared, by_threads}));
    plan.grid.blocks = blocks_for(row, resident * device.multiprocessors, rows);
    plan.steps = divide_up(rows, plan.grid.blocks);
  }
  return plan;
}

}  // namespace ueo_fast::cuda
