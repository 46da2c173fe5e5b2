// max_c softmax(scale z)_c of each row (docs/math.md, step 2): one read.
#pragma once

#include "row_loop.cuh"
#include "ueo_loss_row.cuh"

namespace ueo_fast::cuda {

template <class T>
struct MaxSoftmaxArguments {
  using A = ComputeType<T>;
  Matrix<T> logits;
  A scale;
  RowLoop loop;
  A* out;  // (rows,)
};

template <class T, bool kBlock>
UEO_FAST_KERNEL __launch_bounds__((kBlockThreads<T, kBlock>), (kResidentBlocks<T, kBlock>))
    max_softmax(MaxSoftmaxArguments<T> args) {
  using A = ComputeType<T>;
  const RowLoop& loop = args.loop;
  auto [block, lanes, team_index] = row_teams(loop);
  auto& team = team_of<kBlock>(block, lanes);
  const Frame<T> frame = block_frame(args.logits);
  for (int64_t step = 0; step < loop.steps; ++step) {
    const int64_t index = loop.row(team_index, step);
    const bool present = index < args.logits.rows;
    const Row<T> row = row_or_nothing(args.logits, frame, index);
    OnlineSoftmax<A> softmax;
    StreamedRow<T>{}.for_each(
        team, row, [&](int, const Slot<T>& slot) { softmax.add(slot, args.scale); });
    softmax.merge(team, args.scale);
    if (present && team.rank == 0) {
      args.out[index] = 1 / (args.scale == 1 ? softmax.sum : softmax.scaled_sum);
    }
  }
}

}  // namespace ueo_fast::cuda
