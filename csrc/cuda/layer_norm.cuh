// Layer normalisation of rows and its gradients: one read of each input from memory, one write of
// each output, wherever rows fit into shared memory. docs/kernels.md, "Affine kernels".
#pragma once

#include "channel_affine_totals.cuh"
#include "layer_norm_rows.cuh"

namespace ueo_fast::cuda {

template <class T>
struct NormForwardArguments {
  using A = ComputeType<T>;
  Matrix<T> x;
  const A* weight;
  const A* bias;
  A eps;
  RowLoop loop;
  bool columns_shared;  // whether weight and bias fit into shared memory
  T* out;
  A* mean;
  A* rstd;
};

template <class T, bool kBlock>
UEO_FAST_KERNEL __launch_bounds__((kBlockThreads<T, kBlock>), (kResidentBlocks<T, kBlock>))
    layer_norm(NormForwardArguments<T> args) {
  using A = ComputeType<T>;
  const RowLoop& loop = args.loop;
  auto [block, lanes, team_index] = row_teams(loop);
  auto& team = team_of<kBlock>(block, lanes);

  unsigned char* memory = shared_memory() + kScratchBytes;
  const ColumnSlots<T> columns(loop.slots);
  NormValues<T> weight{nullptr, args.weight, columns, A(1)};
  NormValues<T> bias{nullptr, args.bias, columns, A(0)};
  if (args.columns_shared) {
    weight.shared = reinterpret_cast<A*>(memory);
    bias.shared = weight.shared + columns.size();
    memory += 2 * sizeof(A) * columns.size();
  }
  const NormCache<T> cache{
      {reinterpret_cast<Slot<T>*>(memory) + team_index * loop.cached, loop.cached}, true};
  const Frame<T> frame = block_frame(args.x);
  cache.fetch_all(team, row_or_nothing(args.x, frame, loop.row(team_index, 0)));
  weight.stage(block, frame);
  bias.stage(block, frame);
  __syncthreads();

  const A share = A(1) / static_cast<A>(args.x.columns);
  for (int64_t step = 0; step < loop.steps; ++step) {
    const int64_t index = loop.row(team_index, step);
    const Row<T> row = row_or_nothing(args.x, frame, index);
    const Row<T> next = row_or_nothing(args.x, frame, loop.row(team_index, step + 1));
    copies_wait();
    A sum[1] = {0};
#pragma unroll 1
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) {
      A x[kPerSlot<T>];
      cache.read(row, slot, A(0), x);
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) sum[0] += x[k];
    }
    team.reduce(Sum{}, sum);
    const A about = sum[0] * share;
    A moments[2] = {0, 0};  // of x - about, of its square
#pragma unroll 1
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) {
      A x[kPerSlot<T>];
      cache.read(row, slot, about, x);
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        const A d = x[k] - about;
        moments[0] += d;
        moments[1] = multiply_add(d, d, moments[1]);
      }
    }
    team.reduce(Sum{}, moments);
    // Far from zero the first sum has lost digits, which the second brings back.
    const A correction = moments[0] * share;
    const A mean = about + correction;
    const A variance = moments[1] * share - correction * correction;
    const A rstd = reciprocal_root((variance < 0 ? A(0) : variance) + args.eps);
    if (row.frame.slots != 0 && team.rank == 0) {
      args.mean[index] = mean;
      args.rstd[index] = rstd;
    }
#pragma unroll 1
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) {
      A x[kPerSlot<T>];
      A w[kPerSlot<T>];
      A b[kPerSlot<T>];
      cache.read(row, slot, mean, x);
      if (next.frame.slots != 0) cache.fetch(next, slot);  // it has been read for the last time
      weight.load(row.frame, slot, w);
      bias.load(row.frame, slot, b);
      Slot<T> out;
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) {
        out.x[k] = to_storage<T>(multiply_add((x[k] - mean) * rstd, w[k], b[k]));
      }
      store_in_row(row.frame, slot, out, args.out + index * args.x.columns);
    }
  }
}

template <class T>
struct NormBackwardArguments {
  using A = ComputeType<T>;
  Matrix<T> grad_out;
  Matrix<T> x;
  bool aligned;         // whether rows of both start at the same place in their slots
  const A* mean;
  const A* rstd;
  const A* weight;
  RowLoop loop;
  bool columns_shared;
  T* grad_x;            // or null
  A* column_sums;       // (blocks, 2, teams, column numbers) if shared memory has no room
  A* partials;          // (partials, 2, columns)
};

// Lanes that add up columns: their rows and sums in shared memory leave room for few blocks, which
// may then have twice the registers.
template <class T, bool kBlock, bool kSums>
inline constexpr int kNormGradientBlocks =
    kSums && !kBlock ? 65536 / (tuning::kLaneTeamThreads * kMaxRegistersWide)
                     : kResidentBlocks<T, kBlock>;

// With h = grad_out weight and n = (x - mean) rstd: grad_x = rstd (h - mean(h) - n mean(h n)), and
// the column sums of grad_out n and of grad_out.
template <class T, bool kBlock, bool kSums>
UEO_FAST_KERNEL
__launch_bounds__((kBlockThreads<T, kBlock>), (kNormGradientBlocks<T, kBlock, kSums>))
    layer_norm_gradient(NormBackwardArguments<T> args) {
  using A = ComputeType<T>;
  const RowLoop& loop = args.loop;
  auto [block, lanes, team_index] = row_teams(loop);
  auto& team = team_of<kBlock>(block, lanes);

  unsigned char* memory = shared_memory() + kScratchBytes;
  const ColumnSlots<T> columns(loop.slots);
  NormValues<T> weight{nullptr, args.weight, columns, A(1)};
  const int64_t set = loop.teams * columns.size();
  A* all_sums = nullptr;
  if (args.columns_shared) {
    weight.shared = reinterpret_cast<A*>(memory);
    memory += sizeof(A) * columns.size();
    if (kSums) {
      all_sums = reinterpret_cast<A*>(memory);
      memory += 2 * sizeof(A) * set;
    }
  } else if (kSums) {
    all_sums = args.column_sums + int64_t{blockIdx.x} * 2 * set;
  }
  A* sums = all_sums + team_index * columns.size();
  Slot<T>* slots = reinterpret_cast<Slot<T>*>(memory) + 2 * team_index * loop.cached;
  const NormCache<T> cache{{slots, loop.cached}, true};
  const NormCache<T> grad_cache{{slots + loop.cached, loop.cached}, args.aligned};
  const Frame<T> frame = block_frame(args.x);
  // The team's index by value: by reference, nvcc makes longer code.
  const auto row_of = [&, team_index](int64_t step) {
    return row_or_nothing(args.x, frame, loop.row(team_index, step));
  };
  const auto grad_row_of = [&, team_index](int64_t step) {
    return row_or_nothing(args.grad_out, frame, loop.row(team_index, step));
  };
  if constexpr (kSums) {
    columns.clear(team, sums);
    columns.clear(team, sums + set);
  }
  cache.fetch_all(team, row_of(0));
  grad_cache.fetch_all(team, grad_row_of(0));
  weight.stage(block, frame);
  __syncthreads();

  const A share = A(1) / static_cast<A>(args.x.columns);
  for (int64_t step = 0; step < loop.steps; ++step) {
    const int64_t index = loop.row(team_index, step);
    const Row<T> row = row_of(step);
    const Row<T> grad_row = grad_row_of(step);
    const bool present = row.frame.slots != 0;
    const bool has_next = loop.row(team_index, step + 1) < args.x.rows;
    const A mean = args.mean[present ? index : 0];
    const A rstd = args.rstd[present ? index : 0];
    copies_wait();
    A means[2] = {0, 0};  // of h and h n
    if (args.grad_x != nullptr) {
#pragma unroll 1
      for (int slot = team.rank; slot < row.frame.slots; slot += team.size) {
        A x[kPerSlot<T>];
        A g[kPerSlot<T>];
        A w[kPerSlot<T>];
        cache.read(row, slot, mean, x);
        grad_cache.read(grad_row, slot, A(0), g);
        weight.load(row.frame, slot, w);
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) {
          const A h = g[k] * w[k];
          means[0] += h;
          means[1] = multiply_add(h, (x[k] - mean) * rstd, means[1]);
        }
      }
      team.reduce(Sum{}, means);
      means[0] *= share;
      means[1] *= share;
    }
#pragma unroll 1
    for (int slot = team.rank; slot < row.frame.slots; slot += team.size) {
      A n[kPerSlot<T>];
      A g[kPerSlot<T>];
      cache.read(row, slot, mean, n);
      grad_cache.read(grad_row, slot, A(0), g);
#pragma unroll
      for (int k = 0; k < kPerSlot<T>; ++k) n[k] = (n[k] - mean) * rstd;
      if (has_next) {  // these have been read for the last time
        cache.fetch(row_of(step + 1), slot);
        grad_cache.fetch(grad_row_of(step + 1), slot);
      }
      if (args.grad_x != nullptr) {
        A w[kPerSlot<T>];
        weight.load(row.frame, slot, w);
        Slot<T> out;
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) {
          out.x[k] = to_storage<T>(rstd * (g[k] * w[k] - means[0] - n[k] * means[1]));
        }
        store_in_row(row.frame, slot, out, args.grad_x + index * args.x.columns);
      }
      if constexpr (kSums) {
        columns.add(sums + set, slot, A(1), g);
#pragma unroll
        for (int k = 0; k < kPerSlot<T>; ++k) n[k] *= g[k];
        columns.add(sums, slot, A(1), n);
      }
    }
    if constexpr (kSums) {
      const bool last = step + 1 == loop.steps;
      if (last || (step + 1) % tuning::kRowsPerSum == 0) {
        const int64_t partial = blockIdx.x + gridDim.x * (step / tuning::kRowsPerSum);
        A* out = args.partials + partial * 2 * args.x.columns;
        __syncthreads();
        columns.store_total(block, frame, all_sums, loop.teams, out);
        columns.store_total(block, frame, all_sums + set, loop.teams, out + args.x.columns);
        if (!last) {
          __syncthreads();
          columns.clear(team, sums);
          columns.clear(team, sums + set);
        }
      }
    }
  }
}

template <class A>
UEO_FAST_KERNEL __launch_bounds__(tuning::kTotalsThreads)
    layer_norm_totals(int columns, int count, int per_block, const A* partials, A* sums) {
  const auto term = [&](int64_t column, int n) {
    return static_cast<double>(partials[int64_t{n} * 2 * columns + column]);
  };
  const auto store = [&](int64_t column, double sum) { sums[column] = static_cast<A>(sum); };
  add_terms(2 * int64_t{columns}, count, per_block, term, store);
}

}  // namespace ueo_fast::cuda
