// The loss in two reads and one write of the logits, rows in registers: a kernel for the statistics
// of rows and the column sums, and one for the gradient. Steps are those of docs/math.md;
// docs/kernels.md draws who reads what when. Longer rows are for ueo_loss_block.cuh, what fits
// neither (float64, the longest rows, long rows with options, short rows whose gradient has another
// offset from a 16-byte boundary) for ueo_loss_any.cuh.
#pragma once

#include "held_rows.cuh"
#include "row_loop.cuh"
#include "ueo_loss_any.cuh"
#include "ueo_loss_columns.cuh"
#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

template <class T, int kSlots, bool kPlain>
inline constexpr int kRegisterBlocks = register_blocks(kSlots * kPerSlot<T>, kPlain);

// The shared memory of a block.
struct RegisterMemory {
  double* scratch = reinterpret_cast<double*>(shared_memory());  // of BlockTeam
  Edges& edges = *reinterpret_cast<Edges*>(shared_memory() + kScratchBytes);
  double (*totals)[3] =  // of each team: sums of w, v, w H
      reinterpret_cast<double (*)[3]>(shared_memory() + kScratchBytes + kEdgesBytes);
  // Numbers per column, a set of ColumnSlots for each team or for all.
  float* columns =
      reinterpret_cast<float*>(shared_memory() + kScratchBytes + kEdgesBytes + kTeamTotalsBytes);
};

// Adds what the teams of a block have summed up, and writes it by column.
template <class T, int kSlots, int kLanes>
__device__ __forceinline__ void store_column_sums(const Frame<T>& frame,
                                                  const float (&sums)[kSlots * kPerSlot<T>],
                                                  float* shared, float* by_column) {
  const ColumnSlots<T> columns(kSlots * kLanes);
  const BlockTeam block{static_cast<int>(threadIdx.x), tuning::kRegisterThreads, nullptr};
  float* own = shared + block.rank / kLanes * columns.size();
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
#pragma unroll
    for (int j = 0; j < columns.kPieces; ++j) {
      Slot<float> piece;
#pragma unroll
      for (int k = 0; k < columns.kPiece; ++k) {
        piece.x[k] = sums[i * kPerSlot<T> + j * columns.kPiece + k];
      }
      *columns.piece(own, i * kLanes + block.rank % kLanes, j) = piece;
    }
  }
  __syncthreads();
  columns.store_partial_sum(block, frame, shared, tuning::kRegisterThreads / kLanes, by_column);
  __syncthreads();
}

// First read of the logits: steps 1 to 4 of every row, step 5 up to the sum over blocks. Plain: no
// eps, no confidence scale, no given weights.
template <class T, int kSlots, int kLanes, bool kPlain>
UEO_FAST_KERNEL __launch_bounds__(tuning::kRegisterThreads, (kRegisterBlocks<T, kSlots, kPlain>))
    ueo_statistics(StatisticsArguments<T> args) {
  constexpr int kElements = kSlots * kPerSlot<T>;
  constexpr int kTeams = tuning::kRegisterThreads / kLanes;
  const int thread = static_cast<int>(threadIdx.x);
  const RegisterMemory memory;
  const Lanes<kLanes> team(thread);
  const Frame<T> frame = block_frame(args.logits);
  HeldRows<T, kSlots, kLanes> row(args.logits, memory.edges, team.rank, frame);
  const unsigned hop = gridDim.x * kTeams;
  unsigned index = blockIdx.x + gridDim.x * static_cast<unsigned>(thread / kLanes);
  row.start(index, hop);
  row.fetch(index);
  __syncthreads();  // the edges

  WeightRange range{1, 1, 1};
  if constexpr (!kPlain) {
    BlockTeam block{thread, tuning::kRegisterThreads, memory.scratch};
    range = given_range(block, args);
  }
  if (blockIdx.x == 0 && thread == 0) *args.finished = 0;
  double* totals = memory.totals[thread / kLanes];
  if (team.rank == 0) totals[0] = totals[1] = totals[2] = 0;

  const int all_steps = static_cast<int>(args.loop.steps);
  for (int chunk = 0; chunk < all_steps; chunk += tuning::kRowsPerSum) {
    const int rest = all_steps - chunk;
    const int steps = rest < tuning::kRowsPerSum ? rest : tuning::kRowsPerSum;
    float sums[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums[i] = 0;
    float kept[3] = {0, 1, 0};  // maximum, sum, sum of e t: lane r keeps those of the team's row r
#pragma unroll 1
    for (int step = 0; step < steps; ++step, index += hop) {
      float e[kElements];
      float top[1] = {row.take(e)};
      row.fetch(index + hop);
      team.reduce(Larger{}, top);
      const float reference = top[0] == -INFINITY ? 0.0f : top[0];  // a row without any class
      float over_row[kPlain ? 2 : 3] = {};  // sums of e, e t and, unless plain, 2^(scale t)
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float z = e[i];
        const float t = exponent(z, reference);
        e[i] = exp2_of(t);
        over_row[0] += e[i];
        over_row[1] += e[i] * t;
        if constexpr (!kPlain) {
          over_row[2] += exp2_of(args.scale * ((z - reference) * kLog2e<float>));
        }
      }
      team.reduce(Sum{}, over_row);
      const bool present = index < row.rows;
      if constexpr (kPlain) {
        // v / s = 1: the column sums are those of e. What else a row needs is computed for as many
        // rows as the team has lanes at once, each by a lane of its own.
        if (present) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) sums[i] += e[i];
        }
        if (team.rank == step % kLanes) {
          kept[0] = top[0];
          kept[1] = over_row[0];
          kept[2] = over_row[1];
        }
        if (step % kLanes != kLanes - 1 && step + 1 < steps) continue;
        const int behind = step % kLanes - team.rank;  // steps since the row that is kept here
        const unsigned own = index - hop * static_cast<unsigned>(behind);
        RowStatistics<float> stats = without_weights(kept[0], kept[1], kept[2]);
        stats.marginal_weight = stats.sum;
        stats.confidence = 1 / stats.sum;
        double weights[3] = {0, 0, 0};
        if (behind >= 0 && own < row.rows) {
          stats.store(args.row_stats + int64_t{own} * kRowStats);
          weights[0] = stats.confidence;
          weights[1] = stats.marginal_weight;
          weights[2] = stats.confidence * row_entropy(stats);
        }
        team.reduce(Sum{}, weights);
        if (team.rank == 0) {
#pragma unroll
          for (int i = 0; i < 3; ++i) totals[i] += weights[i];
        }
      } else {
        RowStatistics<float> stats = without_weights(top[0], over_row[0], over_row[1]);
        const float inverse_sum = 1 / stats.sum;
        const float scaled_sum = top[0] == -INFINITY ? NAN : over_row[2];
        weigh(stats, scaled_sum, args.weights, present ? index : 0, range);
        float entropy = row_entropy(stats);
        if (args.eps != 0) {
          EpsSums<float> eps_sums;
#pragma unroll
          for (int i = 0; i < kElements; ++i) eps_sums.add(e[i] * inverse_sum, args.eps);
          float both[2] = {eps_sums.entropy, eps_sums.mean_log};
          team.reduce(Sum{}, both);
          entropy = both[0];
          stats.mean_log = both[1];
        }
        if (present) {  // elsewhere e may be NaN: of what lies in the matrix's last slot
          const float weight = stats.marginal_weight * inverse_sum;
#pragma unroll
          for (int i = 0; i < kElements; ++i) sums[i] += weight * e[i];
        }
        if (present && team.rank == 0) {
          stats.store(args.row_stats + int64_t{index} * kRowStats);
          totals[0] += stats.confidence;
          totals[1] += stats.marginal_weight;
          totals[2] += stats.confidence * entropy;
        }
      }
    }
    const int64_t partial = blockIdx.x + int64_t{gridDim.x} * (chunk / tuning::kRowsPerSum);
    store_column_sums<T, kSlots, kLanes>(frame, sums, memory.columns,
                                         args.partial_sums + partial * args.column_stride);
  }
  if (thread < 3) {
    double total = 0;
    for (int i = 0; i < kTeams; ++i) total += memory.totals[i][thread];
    args.block_sums[int64_t{blockIdx.x} * 3 + thread] = total;
  }
}

// Second read and only write: step 8, with b_k = -a log p_k + lambda b log q_k and its mean under p.
// Rows are visited in the opposite order of the statistics: what was read last is still in the L2.
template <class T, int kSlots, int kLanes, bool kPlain>
UEO_FAST_KERNEL __launch_bounds__(tuning::kRegisterThreads, (kRegisterBlocks<T, kSlots, kPlain>))
    ueo_gradient(GradientArguments<T> args) {
  constexpr int kElements = kSlots * kPerSlot<T>;
  constexpr int kTeams = tuning::kRegisterThreads / kLanes;
  const int thread = static_cast<int>(threadIdx.x);
  const RegisterMemory memory;
  const Lanes<kLanes> team(thread);
  const Frame<T> frame = block_frame(args.logits);
  HeldRows<T, kSlots, kLanes> row(args.logits, memory.edges, team.rank, frame);
  const LogMarginal<T> log_q{memory.columns, args.marginal, ColumnSlots<T>(kSlots * kLanes),
                             args.eps};
  const int steps = static_cast<int>(args.loop.steps);
  const unsigned hop = gridDim.x * kTeams;
  unsigned index = blockIdx.x + gridDim.x * static_cast<unsigned>(thread / kLanes) +
                   hop * static_cast<unsigned>(steps - 1);
  row.start(index, -int64_t{hop});
  row.fetch(index);
  // From row `first` of the team on, lane r will need the statistics of row r, if there is one.
  const auto own = [&] { return index - hop * static_cast<unsigned>(team.rank); };
  const auto has_own = [&](int first) { return first + team.rank < steps && own() < row.rows; };
  const auto load_own = [&] {
    return RowStatistics<float>::load(args.row_stats + int64_t{own()} * kRowStats);
  };
  const RowStatistics<float> first_stats =
      has_own(0) ? load_own() : RowStatistics<float>{0, 1, 0, 0, 0};
  log_q.stage(BlockTeam{thread, tuning::kRegisterThreads, nullptr}, frame);
  __syncthreads();  // the edges as well
  const GradientScale<float> scale = args.gradient_scale();

  float kept[4];  // maximum, 1 / s, factors of b: lane r keeps those of row r
  const auto keep = [&](const RowStatistics<float>& stats) {
    const GradientRow<float> gradient(stats, scale);
    kept[0] = gradient.max;
    kept[1] = gradient.inverse_sum;
    // p = e / s is never formed: the division is in both factors of b, and so in its mean.
    kept[2] = gradient.entropy_factor * gradient.inverse_sum;
    kept[3] = gradient.marginal_factor * gradient.inverse_sum;
  };
  keep(first_stats);
#pragma unroll 1
  for (int step = 0; step < steps; ++step, index -= hop) {
    if (step != 0 && step % kLanes == 0 && has_own(step)) keep(load_own());
    const int lane = step % kLanes;
    const float max = team.from(lane, kept[0]);
    const float inverse_sum = team.from(lane, kept[1]);
    const float entropy_factor = team.from(lane, kept[2]);
    const float marginal_factor = team.from(lane, kept[3]);
    float e[kElements];
    float b[kElements];
    row.take(e);
    // 32 floats of the next row do not fit in registers together with e and b.
    constexpr bool kFetchesEarly = sizeof(T) == 2 || kElements < 32;
    if constexpr (kFetchesEarly) row.fetch(index - hop);
    float mean[1] = {0};
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      float logs[kPerSlot<T>];
      log_q.columns.load(memory.columns, i * kLanes + team.rank, logs);
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        const int n = i * kPerSlot<T> + k;
        const float t = exponent(e[n], max);
        e[n] = exp2_of(t);
        float log_p = t;
        if constexpr (!kPlain) {
          const float p = e[n] * inverse_sum;
          log_p = log_of(p + args.eps) + p / (p + args.eps);
        }
        b[n] = entropy_factor * log_p + marginal_factor * logs[k];
        mean[0] += e[n] * b[n];
      }
    }
    team.reduce(Sum{}, mean);
    mean[0] *= inverse_sum;
#pragma unroll
    for (int n = 0; n < kElements; ++n) e[n] *= b[n] - mean[0];
    if constexpr (!kFetchesEarly) row.fetch(index - hop);
    if (index < row.rows) row.store(args.grad + int64_t{index} * args.logits.columns, e, args.stream);
  }
}

}  // namespace ueo_fast::cuda
