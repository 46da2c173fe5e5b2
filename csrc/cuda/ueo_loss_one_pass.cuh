// Loss and gradient in one read and one write of the logits, for batches that fit on the chip: one
// persistent block per multiprocessor keeps its rows in shared memory and registers, and the grid
// waits for itself where the loss couples all rows (step 5). Steps are those of docs/math.md.
#pragma once

#include "ueo_loss.cuh"
#include "ueo_loss_marginal.cuh"

namespace ueo_fast::cuda {

template <class T>
struct OnePassArguments {
  using A = ComputeType<T>;
  Matrix<T> logits;
  Weights<A> weights;
  A scale;
  bool scan;                // as in StatisticsArguments
  WeightRange* range;
  int lanes;
  int teams;
  int slots;
  int shared_rows;          // of a block, in shared memory
  int held_rows;            // of a team, in registers
  int rows_per_block;
  int sum_groups;
  double* block_sums;       // (blocks, 3)
  A* partial_sums;          // (blocks, columns)
  MarginalArguments<A> marginal;
  T* grad;                  // (rows, columns) contiguous
};

// Rows that found no room in shared memory, in registers: slot rank + i * size of row n is element
// n * per_row + i. The compiler must know every index, or the array would go to local memory.
template <class T>
struct HeldRows {
  static constexpr int kSlots = sizeof(T) == 8 ? 1 : tuning::kHeldSlots;  // 1: none, see launch.h
  Slot<T> held[kSlots];

  // move(row, slot number, element) for the slots of `rows` rows that the thread has.
  template <class Team, class F>
  __device__ __forceinline__ void for_each(const Team& team, int slots, int rows, F&& move) {
    const int per_row = (slots + team.size - 1) / team.size;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int slot = team.rank + i % per_row * team.size;
      if (i / per_row < rows && slot < slots) move(i / per_row, slot, held[i]);
    }
  }
};

template <class T, bool kBlock>
UEO_FAST_KERNEL __launch_bounds__(tuning::kOnePassThreads, 1)
    ueo_one_pass(OnePassArguments<T> args) {
  using A = ComputeType<T>;
  BlockTeam block{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                  reinterpret_cast<double*>(shared_memory())};
  LaneTeam lanes{block.rank % args.lanes, args.lanes};
  auto& team = team_of<kBlock>(block, lanes);
  const int team_index = block.rank / args.lanes;
  const ColumnSlots<T> columns(args.slots);
  const Frame<T> frame = block_frame(args.logits);
  const A eps = args.marginal.eps;

  unsigned char* memory = shared_memory() + kScratchBytes;
  double* marginal_scratch = reinterpret_cast<double*>(memory);
  memory += sizeof(double) * block.size;
  A* sums = reinterpret_cast<A*>(memory);  // a set for each group; later log q
  memory += sizeof(A) * columns.size() * args.sum_groups;
  Slot<T>* slots = reinterpret_cast<Slot<T>*>(memory);
  memory += int64_t{16} * args.slots * args.shared_rows;
  A* all_row_stats = reinterpret_cast<A*>(memory);  // (rows_per_block, kRowStats)

  // Row i of the block is row `index(i)` of the batch. Places in shared memory are numbered turn by
  // turn: place turn * teams + team belongs to a team, and to the same lanes in each slot.
  const auto index = [&](int i) { return blockIdx.x + int64_t{gridDim.x} * i; };
  const auto place_of = [&](int turn) { return turn * args.teams + team_index; };
  const auto at = [&](int place) {
    return CachedRow<T>{slots + int64_t{place} * args.slots, args.slots};
  };
  // The row in a place: its own, or at first one that will go on into registers.
  const auto row_in = [&](int place, int offset) {
    const bool used = place < args.shared_rows && place + offset < args.rows_per_block;
    return row_or_nothing(args.logits, frame, used ? index(place + offset) : INT64_MAX);
  };
  const int turns = (args.shared_rows + args.teams - 1) / args.teams;
  const int per_arrival = (turns - args.held_rows + tuning::kArrivals - 1) / tuning::kArrivals;

  // The only read, in groups of copies: rows for the registers first, which borrow the places of
  // turns [0, held_rows); then turns [held_rows, turns); the owners of the borrowed places last.
  const auto fetch = [&](int first, int last, int offset) {
    for (int turn = first; turn < last && turn < turns; ++turn) {
      at(place_of(turn)).fetch_all(team, row_in(place_of(turn), offset));
    }
    copies_commit();
  };
  fetch(0, args.held_rows, args.shared_rows);
  for (int arrival = 0; arrival < tuning::kArrivals; ++arrival) {
    const int first = args.held_rows + arrival * per_arrival;
    fetch(first, first + per_arrival, 0);
  }

  WeightRange range{1, 1, 1};
  if (args.weights.confidence != nullptr || args.weights.marginal_weights != nullptr) {
    range = args.scan ? scan_weights(block, args.weights, args.logits.rows) : *args.range;
  }
  if (args.scan && blockIdx.x == 0 && block.rank == 0) *args.range = range;

  // Steps 1 to 4 of the row in a place.
  double totals[3] = {0, 0, 0};
  const auto statistics = [&](int place, int offset) {
    const Row<T> row = row_in(place, offset);
    const bool present = row.frame.slots != 0;
    const CachedRow<T> cache = at(present ? place : 0);
    RowStatistics<A> stats =
        row_statistics<A>(team, cache, row, present ? index(place + offset) : 0, args.scale,
                          args.weights, range);
    A entropy;
    if (eps != 0) {
      EpsSums<A> eps_sums;
      cache.for_each(team, row, [&](int, const Slot<T>& z) {
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) {
          eps_sums.add(exp2_of(exponent(to_compute(z.x[k]), stats.max)) / stats.sum, eps);
        }
      });
      A both[2] = {eps_sums.entropy, eps_sums.mean_log};
      team.reduce(Sum{}, both);
      entropy = both[0];
      stats.mean_log = both[1];
    } else {
      entropy = row_entropy(stats);
    }
    if (present && team.rank == 0) {
      stats.store(all_row_stats + (place + offset) * kRowStats);
      totals[0] += stats.confidence;
      totals[1] += stats.marginal_weight;
      totals[2] += static_cast<double>(stats.confidence) * entropy;
    }
  };

  // Step 5: a thread per slot and group of rows adds what lies in places [0, last).
  const int width = block.size / args.sum_groups;
  const int group = block.rank / width;
  const LaneTeam column_team{block.rank % width, width};
  A* own_sums = sums + group * columns.size();
  const auto add_columns = [&](int last, int offset) {
    if (group >= args.sum_groups) return;
    for (int place = group; place < last; place += args.sum_groups) {
      const Row<T> row = row_in(place, offset);
      if (row.frame.slots == 0) return;
      const auto stats = RowStatistics<A>::load(all_row_stats + (place + offset) * kRowStats);
      const A weight = stats.marginal_weight / stats.sum;
      at(place).for_each(column_team, row, [&](int slot, const Slot<T>& z) {
        A e[kPerSlot<T>];
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) {
          e[k] = exp2_of(exponent(to_compute(z.x[k]), stats.max));
        }
        columns.add(own_sums, slot, weight, e);
      });
    }
  };
  if (group < args.sum_groups) columns.clear(column_team, own_sums);

  HeldRows<T> held;
  for (int round = 0; round < tuning::kArrivals + 2; ++round) {
    static_assert(tuning::kArrivals == 3);
    switch (round) {  // groups that may still be under way
      case 0:
      case 1:
        copies_wait_prior<3>();
        break;
      case 2:
        copies_wait_prior<2>();
        break;
      case 3:
        copies_wait_prior<1>();
        break;
      default:
        copies_wait_prior<0>();
    }
    const bool borrowed = round == 0;
    const bool owners = round == tuning::kArrivals + 1;
    const int first = borrowed || owners ? 0 : args.held_rows + (round - 1) * per_arrival;
    const int last = borrowed || owners ? args.held_rows : first + per_arrival;
    for (int turn = first; turn < last && turn < turns; ++turn) {
      statistics(place_of(turn), borrowed ? args.shared_rows : 0);
    }
    if (borrowed) {
      if (args.held_rows > 0) {
        __syncthreads();  // rows and statistics of all teams, for the threads of a column
        add_columns(args.held_rows * args.teams, args.shared_rows);
        __syncthreads();  // before a place is given back
        held.for_each(team, frame.slots, args.held_rows, [&](int n, int slot, Slot<T>& value) {
          value = at(place_of(n)).cache[slot];
        });
      }
      fetch(0, args.held_rows, 0);
    }
  }
  block.reduce(Sum{}, totals);  // its barrier shows rows and statistics to all threads
  if (block.rank == 0) {
    for (int i = 0; i < 3; ++i) args.block_sums[int64_t{blockIdx.x} * 3 + i] = totals[i];
  }
  add_columns(args.shared_rows, 0);
  __syncthreads();
  columns.store_total(block, frame, sums, args.sum_groups,
                      args.partial_sums + int64_t{blockIdx.x} * args.logits.columns);
  grid_barrier();

  // Steps 5 to 7: every block takes its share of the columns.
  const BatchSums batch = batch_sums(block, args.block_sums, static_cast<int>(gridDim.x));
  const int tiles =
      (args.logits.columns + tuning::kMarginalColumns - 1) / tuning::kMarginalColumns;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    marginal_tile(args.marginal, block, tile, 1 / batch.marginal_weight, marginal_scratch);
  }
  grid_barrier();
  if (blockIdx.x == 0) finish_loss(args.marginal, block, tiles, batch);

  // Step 8, and the only write.
  LogMarginal<T> log_q{sums, args.marginal.marginal, columns, eps};
  log_q.stage(block, frame);
  __syncthreads();
  const A weight_sums[kSummary] = {0, 0, 0, static_cast<A>(batch.confidence),
                                   static_cast<A>(batch.marginal_weight)};
  const GradientScale<A> scale(A(1), args.marginal.trade_off, eps, weight_sums);
  for (int turn = 0; turn < turns + args.held_rows; ++turn) {
    if (turn == turns) {  // the places are free: rows come back from the registers
      held.for_each(team, frame.slots, args.held_rows, [&](int n, int slot, Slot<T>& value) {
        at(place_of(n)).cache[slot] = value;
      });
    }
    const int place = place_of(turn < turns ? turn : turn - turns);
    const int offset = turn < turns ? 0 : args.shared_rows;
    const Row<T> row = row_in(place, offset);
    const bool present = row.frame.slots != 0;
    const CachedRow<T> cache = at(present ? place : 0);
    GradientRow<A> gradient(
        RowStatistics<A>::load(all_row_stats + (present ? place + offset : 0) * kRowStats), scale);
    gradient.mean_log_marginal = mean_log_marginal<A>(team, cache, row, gradient, log_q);
    cache.for_each(team, row, [&](int slot, const Slot<T>& z) {
      store_gradient(row.frame, slot, z, gradient, log_q,
                     args.grad + index(place + offset) * args.logits.columns, false);
    });
  }
}

}  // namespace ueo_fast::cuda
