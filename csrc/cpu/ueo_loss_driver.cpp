#include "ueo_loss_driver.h"

#include <algorithm>
#include <limits>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "tuning.h"

namespace ueo_fast::cpu {
namespace {

using namespace tuning;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// From the shape alone: see kMinRowsPerBlock.
int64_t rows_per_block(int64_t rows) {
  return std::clamp(round_up(rows / kTargetBlocks, kRowGroup), kMinRowsPerBlock, kMaxRowsPerBlock);
}

// Uninitialised memory, aligned so that no register's load or store crosses a cache line. That halves
// the time of the column sums, which do little else.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<A*>(::operator new(size * sizeof(A), kCacheLine))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kCacheLine); }
  A* get() const { return data_; }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  A* data_;
};

template <class A>
struct Range {
  A low;
  A high;
};

// The smallest and the largest value; both are NaN if any value is.
template <class A>
Range<A> range_of(const A* values, int64_t count) {
  // Selects in arrays of lanes, which compilers vectorise: a third of std::minmax_element's time.
  constexpr int64_t kLanes = 16;
  A low[kLanes], high[kLanes], nan[kLanes];
  std::fill_n(low, kLanes, values[0]);
  std::fill_n(high, kLanes, values[0]);
  std::fill_n(nan, kLanes, A(0));
  const auto include = [&](int64_t l, A value) {
    low[l] = value < low[l] ? value : low[l];
    high[l] = value > high[l] ? value : high[l];
    nan[l] = value == value ? nan[l] : value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) include(l, values[i + l]);
  }
  for (; i < count; ++i) include(0, values[i]);
  const A any_nan = std::accumulate(nan, nan + kLanes, A(0));
  if (any_nan != 0) return {any_nan, any_nan};
  return {*std::min_element(low, low + kLanes), *std::max_element(high, high + kLanes)};
}

// ueo_fast/arguments.py has the same checks with messages for users.
template <class A>
Range<A> checked_range(const char* name, const A* values, int64_t count, bool positive) {
  const Range<A> range = range_of(values, count);
  const bool above = positive ? range.low > 0 : range.low >= 0 && range.high > 0;
  if (above && range.high <= std::numeric_limits<A>::max()) return range;
  std::ostringstream message;
  message << "ueo_fast: " << name << " must be "
          << (positive ? "positive and finite" : "finite, not negative and not all zero")
          << ", got values from " << range.low << " to " << range.high;
  throw std::invalid_argument(message.str());
}

// kRowGroup rows of exponentials and two tiles.
int64_t scratch_size(int64_t columns) {
  return kRowGroup * round_up(columns, kPad) + 2 * kTileColumns;
}

}  // namespace

template <class A>
double ueo_forward(const UeoLoops<A>& loops, ForwardRows<A> args, A* summary, A* marginal,
                   const ParallelFor& parallel_for) {
  const int64_t rows = args.logits.rows;
  if (args.confidence) {
    const auto [low, high] = checked_range("confidence", args.confidence, rows, true);
    args.smallest_confidence = low;
    args.largest_confidence = high;
  }
  if (args.marginal_weights) {
    args.largest_marginal_weight =
        checked_range("marginal_weights", args.marginal_weights, rows, false).high;
  }
  const int64_t columns = args.logits.columns;
  const int64_t row_size = round_up(columns, kPad);
  const int64_t block_rows = rows_per_block(rows);
  const int64_t blocks = round_up(rows, block_rows) / block_rows;
  const Buffer<A> column_sums(blocks * row_size);
  std::vector<BlockSums> sums(blocks);
  parallel_for(blocks, [&](int64_t first, int64_t last) {
    const Buffer<A> scratch(scratch_size(columns));
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * block_rows;
      loops.forward(args, begin, std::min(begin + block_rows, rows), &sums[block],
                    column_sums.get() + block * row_size, scratch.get());
    }
  });

  BlockSums total;
  for (const BlockSums& block : sums) {
    total.confidence += block.confidence;
    total.marginal_weight += block.marginal_weight;
    total.weighted_entropy += block.weighted_entropy;
  }

  const int64_t tiles = round_up(row_size, kTileColumns) / kTileColumns;
  std::vector<double> tile_entropy(tiles);
  const auto marginal_tiles = [&](int64_t first, int64_t last) {
    alignas(64) A q[kTileColumns];
    alignas(64) A log_q[kTileColumns];
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kTileColumns;
      const int64_t n = std::min(kTileColumns, row_size - begin);
      loops.marginal(column_sums.get() + begin, blocks, row_size, 1 / total.marginal_weight, n, q);
      tile_entropy[tile] = -loops.log_marginal(q, args.options.eps, n, log_q);
      std::copy(q, q + std::min(n, columns - begin), marginal + begin);
    }
  };
  if (blocks * columns < kSerialElements) {
    marginal_tiles(0, tiles);
  } else {
    parallel_for(tiles, marginal_tiles);
  }
  double marginal_entropy = 0;
  for (const double entropy : tile_entropy) marginal_entropy += entropy;

  const double conditional_entropy = total.weighted_entropy / total.confidence;
  summary[kConditionalEntropy] = static_cast<A>(conditional_entropy);
  summary[kMarginalEntropy] = static_cast<A>(marginal_entropy);
  summary[kMeanConfidence] =
      static_cast<A>(total.confidence / static_cast<double>(rows) * args.largest_confidence);
  summary[kConfidenceSum] = static_cast<A>(total.confidence);
  summary[kMarginalWeightSum] = static_cast<A>(total.marginal_weight);
  return conditional_entropy - args.options.trade_off * marginal_entropy;
}

template <class A>
void ueo_backward(const UeoLoops<A>& loops, BackwardRows<A> args, const A* marginal,
                  const ParallelFor& parallel_for) {
  const int64_t rows = args.logits.rows;
  const int64_t columns = args.logits.columns;
  const int64_t row_size = round_up(columns, kPad);
  const Buffer<A> q(row_size);
  const Buffer<A> log_q(row_size);
  std::copy(marginal, marginal + columns, q.get());
  std::fill(q.get() + columns, q.get() + row_size, A(0));
  for (int64_t begin = 0; begin < row_size; begin += kTileColumns) {
    const int64_t n = std::min(kTileColumns, row_size - begin);
    loops.log_marginal(q.get() + begin, args.options.eps, n, log_q.get() + begin);
  }
  args.log_marginal = log_q.get();

  // Blocks in reverse: the cache still holds the rows that forward read last.
  const int64_t block_rows = rows_per_block(rows);
  const int64_t blocks = round_up(rows, block_rows) / block_rows;
  parallel_for(blocks, [&](int64_t first, int64_t last) {
    const Buffer<A> scratch(scratch_size(columns));
    for (int64_t block = last - 1; block >= first; --block) {
      const int64_t begin = block * block_rows;
      loops.backward(args, begin, std::min(begin + block_rows, rows), scratch.get());
    }
  });
}

template <class A>
void max_softmax(const UeoLoops<A>& loops, const LogitsView& logits, double scale, A* out,
                 const ParallelFor& parallel_for) {
  const int64_t block_rows = rows_per_block(logits.rows);
  const int64_t blocks = round_up(logits.rows, block_rows) / block_rows;
  parallel_for(blocks, [&](int64_t first, int64_t last) {
    const Buffer<A> scratch(scratch_size(logits.columns));
    loops.max_softmax(logits, scale, first * block_rows, std::min(last * block_rows, logits.rows),
                      scratch.get(), out);
  });
}

#define UEO_FAST_INSTANTIATE(A)                                                                   \
  template double ueo_forward<A>(const UeoLoops<A>&, ForwardRows<A>, A*, A*,                      \
                                 const ParallelFor&);                                             \
  template void ueo_backward<A>(const UeoLoops<A>&, BackwardRows<A>, const A*,                    \
                                const ParallelFor&);                                              \
  template void max_softmax<A>(const UeoLoops<A>&, const LogitsView&, double, A*,                 \
                               const ParallelFor&);
UEO_FAST_INSTANTIATE(float)
UEO_FAST_INSTANTIATE(double)

#define UEO_FAST_SELECT(A, name)                                                      \
  const UeoLoops<A>& name##_loops_base();                                             \
  const UeoLoops<A>& name##_loops_avx2();                                             \
  const UeoLoops<A>& name##_loops_avx512();                                           \
  template <>                                                                         \
  const UeoLoops<A>& ueo_loops<A>([[maybe_unused]] Capability capability) {           \
    UEO_FAST_SELECT_X86(name)                                                         \
    return name##_loops_base();                                                       \
  }
#if defined(__x86_64__)
#define UEO_FAST_SELECT_X86(name)                                         \
  if (capability == Capability::kAvx512) return name##_loops_avx512();    \
  if (capability == Capability::kAvx2) return name##_loops_avx2();
#else
#define UEO_FAST_SELECT_X86(name)
#endif
UEO_FAST_SELECT(float, float)
UEO_FAST_SELECT(double, double)

}  // namespace ueo_fast::cpu
