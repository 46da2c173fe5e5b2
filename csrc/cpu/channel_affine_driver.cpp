#include "channel_affine_driver.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tuning.h"

namespace ueo_fast::cpu {
namespace {

using namespace tuning;

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Units of work where a run is long: chunks of adjacent elements.
struct Chunks {
  int64_t elements;
  int64_t inner;

  int64_t count() const { return divide_up(elements, kAffineChunk); }
  int64_t begin(int64_t chunk) const { return chunk * kAffineChunk; }
  int64_t end(int64_t chunk) const { return std::min((chunk + 1) * kAffineChunk, elements); }

  // Every (run, chunk) that overlap have their own pair of sums. Their numbers grow along memory,
  // because a chunk's first run is the previous chunk's last run or the one after it.
  int64_t slot(int64_t run, int64_t chunk) const { return run + chunk; }
  int64_t slots() const { return divide_up(elements, inner) + count(); }
};

// Units of work where runs are short: memory as rows that are a multiple of 16 elements, so that
// every row begins with a byte of the mask and full registers.
struct Blocks {
  int64_t elements;
  int64_t columns;
  int64_t rows;
  int64_t rows_per_block;
  int64_t column_tiles;

  explicit Blocks(const ChannelLayout& layout) : elements(layout.elements()) {
    const int64_t period = layout.channels * layout.inner;
    columns = period;
    while (columns % kPad != 0) columns += columns;  // at most 4 times
    if (columns < kMinSpread) columns *= divide_up(kMinSpread, columns);
    rows = divide_up(elements, columns);
    rows_per_block = std::clamp(divide_up(rows, kTargetBlocks), kMinAffineRows, kMaxAffineRows);
    column_tiles = divide_up(columns, kAffineTile);
  }

  int64_t row_blocks() const { return divide_up(rows, rows_per_block); }
  int64_t count() const { return row_blocks() * column_tiles; }
  int64_t row_block(int64_t unit) const { return unit / column_tiles; }

  Block operator[](int64_t unit) const {
    const int64_t row = row_block(unit) * rows_per_block;
    const int64_t column = unit % column_tiles * kAffineTile;
    return {row, std::min(row + rows_per_block, rows), column,
            std::min(column + kAffineTile, columns)};
  }
};

bool has_long_runs(const ChannelLayout& layout) { return layout.inner >= kMinRun; }

// The channels' values, one per element of a row.
template <class A>
std::vector<A> spread(const std::vector<A>& values, const ChannelLayout& layout, int64_t columns) {
  std::vector<A> out(columns);
  int64_t column = 0;
  while (column < columns) {
    for (int64_t c = 0; c < layout.channels; ++c, column += layout.inner) {
      std::fill_n(out.data() + column, layout.inner, values[c]);
    }
  }
  return out;
}

// The second level of the sums, (2, channels), in double and in the order of memory.
template <class A>
std::vector<double> add_slots(const std::vector<A>& slots, const Chunks& chunks,
                              const ChannelLayout& layout) {
  std::vector<double> totals(2 * layout.channels);
  for (int64_t run = 0; run < layout.outer * layout.channels; ++run) {
    const int64_t c = run % layout.channels;
    const int64_t begin = run * layout.inner;
    const int64_t last = (begin + layout.inner - 1) / kAffineChunk;
    for (int64_t chunk = begin / kAffineChunk; chunk <= last; ++chunk) {
      const A* pair = slots.data() + 2 * chunks.slot(run, chunk);
      totals[c] += pair[0];
      totals[layout.channels + c] += pair[1];
    }
  }
  return totals;
}

// In eight chains: in a single one, each addition would wait for the one before it.
double sum_of(const double* values, int64_t n) {
  double lane[8] = {};
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    for (int64_t l = 0; l < 8; ++l) lane[l] += values[j + l];
  }
  for (int64_t l = 0; j + l < n; ++l) lane[l] += values[j + l];
  for (int64_t l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

template <class A>
std::vector<double> add_blocks(const std::vector<A>& parts, const Blocks& blocks,
                               const ChannelLayout& layout) {
  const int64_t columns = blocks.columns;
  std::vector<double> by_column(2 * columns);
  for (int64_t block = 0; block < blocks.row_blocks(); ++block) {
    const A* part = parts.data() + block * 2 * columns;
    for (int64_t j = 0; j < 2 * columns; ++j) by_column[j] += part[j];
  }
  std::vector<double> totals(2 * layout.channels);
  int64_t column = 0;
  while (column < 2 * columns) {
    double* total = totals.data() + (column < columns ? 0 : layout.channels);
    for (int64_t c = 0; c < layout.channels; ++c, column += layout.inner) {
      total[c] += sum_of(by_column.data() + column, layout.inner);
    }
  }
  return totals;
}

// Per-channel numbers derived from the parameters. Forward and backward call the same function, so
// the recomputed mask agrees to the bit.
template <class A>
struct Modulation {
  std::vector<A> rstd;
  std::vector<A> scale;
  std::vector<A> shift;
  std::vector<A> mean;
};

template <class A>
[[gnu::noinline]] Modulation<A> modulation(const ChannelParameters<A>& p, int64_t channels) {
  const auto values_or = [channels](const A* values, A otherwise) {
    return values ? std::vector<A>(values, values + channels) : std::vector<A>(channels, otherwise);
  };
  Modulation<A> numbers{std::vector<A>(channels, 1), values_or(p.weight, 1), values_or(p.bias, 0),
                        values_or(p.mean, 0)};
  for (int64_t c = 0; p.var && c < channels; ++c) {
    numbers.rstd[c] = 1 / std::sqrt(p.var[c] + p.eps);
    numbers.scale[c] *= numbers.rstd[c];
  }
  // Rounded once, as on a GPU. Without a mean, an infinite scale must not be multiplied by 0.
  for (int64_t c = 0; p.mean && c < channels; ++c) {
    numbers.shift[c] = std::fma(-numbers.mean[c], numbers.scale[c], numbers.shift[c]);
  }
  return numbers;
}

}  // namespace

template <class A>
void affine_forward(const AffineLoops<A>& loops, const ChannelLayout& layout, AffineForward<A> args,
                    const ChannelParameters<A>& parameters, const ParallelFor& parallel_for) {
  args.elements = layout.elements();
  const Modulation<A> numbers = modulation(parameters, layout.channels);
  if (has_long_runs(layout)) {
    const Chunks chunks{args.elements, layout.inner};
    args.parameters = {numbers.scale.data(), numbers.shift.data(), nullptr, layout.inner,
                       layout.channels};
    return parallel_for(chunks.count(), [&](int64_t first, int64_t last) {
      loops.forward_runs(args, chunks.begin(first), chunks.end(last - 1));
    });
  }
  const Blocks blocks(layout);
  const std::vector<A> scales = spread(numbers.scale, layout, blocks.columns);
  const std::vector<A> shifts = spread(numbers.shift, layout, blocks.columns);
  args.parameters = {scales.data(), shifts.data(), nullptr, blocks.columns, layout.channels};
  parallel_for(blocks.count(), [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) loops.forward_columns(args, blocks[unit]);
  });
}

template <class A>
void affine_backward(const AffineLoops<A>& loops, const ChannelLayout& layout,
                     AffineBackward<A> args, const ChannelParameters<A>& parameters,
                     A* grad_weight, A* grad_bias, const ParallelFor& parallel_for) {
  args.elements = layout.elements();
  const Modulation<A> numbers = modulation(parameters, layout.channels);
  const bool sums = grad_weight || grad_bias;
  std::vector<double> totals;  // of g, then of g (x - mean)
  if (has_long_runs(layout)) {
    const Chunks chunks{args.elements, layout.inner};
    args.parameters = {numbers.scale.data(), numbers.shift.data(), numbers.mean.data(),
                       layout.inner, layout.channels};
    std::vector<A> slots(sums ? 2 * chunks.slots() : 0);
    parallel_for(chunks.count(), [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = chunks.begin(chunk);
        const int64_t slot = chunks.slot(begin / layout.inner, chunk);
        loops.backward_runs(args, begin, chunks.end(chunk),
                            sums ? slots.data() + 2 * slot : nullptr);
      }
    });
    if (sums) totals = add_slots(slots, chunks, layout);
  } else {
    const Blocks blocks(layout);
    const std::vector<A> scales = spread(numbers.scale, layout, blocks.columns);
    const std::vector<A> shifts = spread(numbers.shift, layout, blocks.columns);
    const std::vector<A> means = spread(numbers.mean, layout, blocks.columns);
    args.parameters = {scales.data(), shifts.data(), means.data(), blocks.columns,
                       layout.channels};
    std::vector<A> parts(sums ? blocks.row_blocks() * 2 * blocks.columns : 0);
    parallel_for(blocks.count(), [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        A* part = parts.data() + blocks.row_block(unit) * 2 * blocks.columns;
        loops.backward_columns(args, blocks[unit], sums ? part : nullptr);
      }
    });
    if (sums) totals = add_blocks(parts, blocks, layout);
  }
  const int64_t channels = layout.channels;
  if (grad_bias) std::copy_n(totals.begin(), channels, grad_bias);
  for (int64_t c = 0; grad_weight && c < channels; ++c) {
    grad_weight[c] = static_cast<A>(totals[channels + c] * numbers.rstd[c]);
  }
}

#define UEO_FAST_INSTANTIATE(A)                                                                   \
  template void affine_forward<A>(const AffineLoops<A>&, const ChannelLayout&, AffineForward<A>,  \
                                  const ChannelParameters<A>&, const ParallelFor&);               \
  template void affine_backward<A>(const AffineLoops<A>&, const ChannelLayout&,                   \
                                   AffineBackward<A>, const ChannelParameters<A>&, A*, A*,        \
                                   const ParallelFor&);
UEO_FAST_INSTANTIATE(float)
UEO_FAST_INSTANTIATE(double)

#define UEO_FAST_SELECT(A, name)                                             \
  const AffineLoops<A>& name##_affine_base();                                \
  const AffineLoops<A>& name##_affine_avx2();                                \
  const AffineLoops<A>& name##_affine_avx512();                              \
  template <>                                                                \
  const AffineLoops<A>& affine_loops<A>([[maybe_unused]] Capability level) { \
    UEO_FAST_SELECT_X86(name)                                                \
    return name##_affine_base();                                             \
  }
#if defined(__x86_64__)
#define UEO_FAST_SELECT_X86(name)                                   \
  if (level == Capability::kAvx512) return name##_affine_avx512();  \
  if (level == Capability::kAvx2) return name##_affine_avx2();
#else
#define UEO_FAST_SELECT_X86(name)
#endif
UEO_FAST_SELECT(float, float)
UEO_FAST_SELECT(double, double)

}  // namespace ueo_fast::cpu
