// What all kernels that walk over rows have in common: the size of their blocks, and which rows a
// team visits.
#pragma once

#include "launch.h"
#include "rows.cuh"
#include "team.cuh"

namespace ueo_fast::cuda {

template <class T>
inline constexpr int kLargestBlock = sizeof(T) == 8 ? tuning::kBlockTeamMaxThreadsDouble
                                                    : tuning::kBlockTeamMaxThreads;
template <class T, bool kBlock>
inline constexpr int kBlockThreads = kBlock ? kLargestBlock<T> : tuning::kLaneTeamThreads;
// Blocks per multiprocessor that registers must leave room for (kMaxRegisters).
template <class T, bool kBlock>
inline constexpr int kResidentBlocks =
    kBlock ? 1
           : 65536 / (tuning::kLaneTeamThreads *
                      (sizeof(T) == 8 ? kMaxRegistersWide : kMaxRegisters));

// What a plan (launch.h) tells every kernel that walks over rows.
struct RowLoop {
  int lanes;
  int teams;
  int slots;
  int cached;
  int64_t steps;

  __device__ __forceinline__ int64_t row(int team, int64_t step) const {
    return blockIdx.x + int64_t{gridDim.x} * (team + teams * step);
  }
};

// How the threads of a block share its rows.
struct RowTeams {
  BlockTeam block;
  LaneTeam lanes;  // the thread's
  int index;       // of the team that the thread belongs to
};

__device__ __forceinline__ RowTeams row_teams(const RowLoop& loop) {
  const BlockTeam block = this_block();
  return {block, {block.rank % loop.lanes, loop.lanes}, block.rank / loop.lanes};
}

inline RowLoop loop_of(const RowShape& row, const RowPlan& plan) {
  return {plan.lanes, plan.teams, row.slots, plan.cached, plan.steps};
}

// Where the rows of this block start in their slots: all at the same place (launch.h, RowPlan).
template <class T>
__device__ __forceinline__ Frame<T> block_frame(const Matrix<T>& matrix) {
  const int64_t any = blockIdx.x < matrix.rows ? blockIdx.x : 0;
  return Frame<T>(matrix.data + any * matrix.row_stride, matrix.columns);
}

// Row `index`, or one without slots where there is no such row: its lanes still take part in what
// their warp does together.
template <class T>
__device__ __forceinline__ Row<T> row_or_nothing(const Matrix<T>& matrix, Frame<T> frame,
                                                 int64_t index) {
  const bool present = index < matrix.rows;
  if (!present) frame.slots = 0;
  return {matrix, matrix.data + (present ? index : 0) * matrix.row_stride, frame};
}

}  // namespace ueo_fast::cuda
