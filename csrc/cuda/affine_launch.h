// Tuning numbers of the affine kernels (channel_affine, layer_norm), each with its reason, and the
// arithmetic that turns a shape and a device into launches. Plain C++, as launch.h, whose budgets
// apply here as well. The numbers follow from the calculations given with them; they were measured on a
// GPU (docs/performance.md), but not tuned yet.
#pragma once

#include <numeric>

#include "../channel_affine.h"
#include "launch.h"

namespace ueo_fast::cuda {
namespace tuning {

// Threads of a block of channel_affine: as in kLaneTeamThreads, and so that four blocks of 64
// registers a thread fill a multiprocessor.
inline constexpr int kAffineThreads = 256;
// Slots of each tensor that a thread has in flight at once: two tensors of two slots by 1,024
// threads are 64 KiB per multiprocessor, twice what hides memory's latency on an H100 (3 TB/s times
// a microsecond over 132 multiprocessors); four would not fit into 64 registers together with the
// sums.
inline constexpr int kAffineBatch = 2;
// A period of few tiles is cut into as many blocks as the GPU holds at once: a thread finds its
// place and its channels' numbers in some 300 to 700 instructions, where a slot takes some 100
// (machine code for sm_90, half precision). If one period needs more than that, blocks come in at
// least this many waves: late ones fill the gaps that early ones leave.
inline constexpr int kAffineWaves = 4;

// The kernel that adds partial sums: threads of a block, columns of a block at most (a warp reads
// 32 adjacent numbers), and partial sums that a thread should have to add.
inline constexpr int kTotalsThreads = 512;
inline constexpr int kTotalsColumns = 32;
inline constexpr int kTotalsPerThread = 4;

}  // namespace tuning

// Numbers that kernels divide by: 64-bit division is a call that makes kernels spill (quotient() in
// channel_affine_slots.cuh).
struct Divisor {
  int64_t by = 1;
  double inverse = 1;

  Divisor() = default;
  explicit Divisor(int64_t number) : by(number), inverse(1.0 / static_cast<double>(number)) {}
};

// How a dense tensor is shared out among threads. Its memory is cut into periods: as few samples as
// end at a multiple of 8 elements, so at whole slots and at whole bytes of the mask. A thread owns
// the same slot of every period: the channels of its elements never change, and their values and
// sums stay in registers. A block takes `width` adjacent slots of
// the period (a tile) in `lines` periods at a time, `steps` times.
struct AffinePlan {
  Grid grid;              // block tile + tiles * chunk
  int64_t elements;
  int64_t period;         // slots
  int width;
  int lines;
  int tiles;
  int chunks;             // of periods: lines * steps each
  int steps;
  bool one_channel;       // whether no slot holds elements of two channels
  int segments;           // runs of one channel in a tile, at most
  int segment_lanes;      // threads that add up a run
  Divisor channels;
  Divisor inner;
  Divisor tile_elements;
};

inline AffinePlan plan_affine(const Device& device, const ChannelLayout& layout, int element_bytes,
                              bool sums) {
  AffinePlan plan{};
  const int per_slot = 16 / element_bytes;
  const int compute_bytes = element_bytes == 8 ? 8 : 4;
  const int64_t sample = layout.channels * layout.inner;
  const int64_t samples = 8 / std::gcd(sample, int64_t{8});
  plan.elements = layout.elements();
  plan.channels = Divisor(layout.channels);
  plan.inner = Divisor(layout.inner);
  // Fewer samples than that: one period holds all of them.
  plan.period = divide_up(std::min(layout.outer, samples) * sample, 8) * (8 / per_slot);
  const int64_t periods = divide_up(plan.elements, plan.period * per_slot);
  plan.tiles = static_cast<int>(divide_up(plan.period, tuning::kAffineThreads));
  plan.width = static_cast<int>(divide_up(plan.period, plan.tiles));
  if (plan.tiles > 1) {  // whole lines of 128 bytes
    plan.width = static_cast<int>(divide_up(plan.width, 8) * 8);
    plan.tiles = static_cast<int>(divide_up(plan.period, plan.width));
  }
  plan.lines = static_cast<int>(
      std::min<int64_t>(tuning::kAffineThreads / plan.width, periods));
  plan.grid.threads = static_cast<int>(divide_up(plan.width * plan.lines, 32) * 32);

  const int registers = compute_bytes == 8 ? kMaxRegistersWide : kMaxRegisters;
  const int resident = std::max(1, std::min(device.threads_per_multiprocessor / plan.grid.threads,
                                            65536 / (registers * plan.grid.threads)));
  const int64_t places = int64_t{device.multiprocessors} * resident;
  const int64_t chunks = plan.tiles <= places
                             ? places / plan.tiles
                             : divide_up(tuning::kAffineWaves * places, plan.tiles);
  const int64_t rounds = divide_up(periods, plan.lines);
  plan.steps = static_cast<int>(
      std::clamp<int64_t>(divide_up(rounds, chunks), 1, tuning::kRowsPerSum));
  plan.chunks = static_cast<int>(divide_up(rounds, plan.steps));
  plan.grid.blocks = plan.tiles * plan.chunks;

  plan.one_channel = layout.inner % per_slot == 0;
  const int64_t tile = int64_t{plan.width} * per_slot;
  plan.tile_elements = Divisor(tile);
  plan.segments = static_cast<int>((tile + layout.inner - 2) / layout.inner + 1);
  plan.segment_lanes = 1;
  while (plan.segment_lanes < 32 && plan.segment_lanes * 2 * plan.segments <= plan.grid.threads) {
    plan.segment_lanes *= 2;
  }
  const int numbers = plan.grid.threads * (plan.one_channel ? 1 : per_slot);
  plan.grid.shared_bytes = sums ? int64_t{2} * numbers * compute_bytes : 0;
  return plan;
}

// Bytes of partial sums that blocks leave behind.
inline int64_t affine_workspace(const AffinePlan& plan, int element_bytes) {
  return int64_t{plan.grid.blocks} * 2 * plan.segments * (element_bytes == 8 ? 8 : 4);
}

// The kernel that adds `terms` partial sums for each of `columns` columns.
inline Grid totals_grid(int64_t columns, int64_t terms, int& columns_per_block) {
  columns_per_block = std::clamp(
      power_of_two_from(divide_up(tuning::kTotalsThreads * tuning::kTotalsPerThread,
                                  std::max<int64_t>(1, terms))),
      1, tuning::kTotalsColumns);
  return {static_cast<int>(divide_up(columns, columns_per_block)), tuning::kTotalsThreads,
          int64_t{tuning::kTotalsThreads} * 8};
}

// Rows of layer_norm, as those of the loss (RowPlan), with what this op keeps of them and per
// column.
struct NormNeeds {
  int rows;           // that a team holds: x; in backward grad_out as well
  int per_block;      // sets of numbers per column: weight, bias
  int per_team;       // the same: column sums
};

inline RowPlan plan_norm(const Device& device, const RowShape& row, int64_t rows,
                         const NormNeeds& needs) {
  RowPlan plan{};
  plan.block_team = row.slots > tuning::kLaneTeamMaxSlots;
  plan.cached = row.slots;
  plan.columns_shared = true;
  plan.teams = 1;
  if (!plan.block_team) {
    plan.grid.threads = tuning::kLaneTeamThreads;
    plan.lanes = std::min(32, power_of_two_from(divide_up(row.slots, tuning::kSlotsPerLane)));
    plan.teams = plan.grid.threads / plan.lanes;
  }
  const int64_t room = device.shared_per_block - kScratchBytes;
  int64_t column_bytes = row.column_bytes() * (needs.per_block + needs.per_team * plan.teams);
  const int64_t copies = int64_t{needs.rows} * plan.teams;
  if (column_bytes + copies * row.row_bytes() > room) {
    // Numbers per column first: a row can be read again, from the L2.
    plan.columns_shared = column_bytes <= room;
    if (!plan.columns_shared) column_bytes = 0;
    plan.cached = static_cast<int>(
        std::min<int64_t>(row.slots, (room - column_bytes) / (16 * copies)));
  }
  plan.grid.shared_bytes = kScratchBytes + column_bytes + int64_t{16} * copies * plan.cached;
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
  // kNormGradientBlocks in layer_norm.cuh
  const bool wide = row.compute_bytes == 8 || (needs.per_team > 0 && !plan.block_team);
  const int registers = wide ? kMaxRegistersWide : kMaxRegisters;
  const int resident =
      std::max(1, std::min({by_shared, device.threads_per_multiprocessor / plan.grid.threads,
                            65536 / (registers * plan.grid.threads)}));
  plan.grid.blocks =
      blocks_for(row, int64_t{resident} * device.multiprocessors, divide_up(rows, plan.teams));
  plan.steps = divide_up(rows, int64_t{plan.grid.blocks} * plan.teams);
  return plan;
}

}  // namespace ueo_fast::cuda
