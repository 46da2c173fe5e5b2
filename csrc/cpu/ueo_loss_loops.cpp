// The loss's loops for one instruction set: this file is compiled once for each, with
// UEO_FAST_LEVEL set to base, avx2 or avx512 (CMakeLists.txt). The loops, on registers (vectors.h)
// or plain under `omp simd`, are in ueo_loss_forward.h and ueo_loss_backward.h.
//
// Everything but the last functions has internal linkage: see half.h.
#include "ueo_loss.h"
#include "ueo_loss_forward.h"
#include "ueo_loss_backward.h"

namespace ueo_fast::cpu {
namespace {

template <class A, class S>
void max_softmax_rows(const LogitsView& logits, double scale, int64_t begin, int64_t end,
                      A* scratch, A* out) {
  for (int64_t row = begin; row < end; ++row) {
    RowReader<A, S> z(logits, row, scratch);
    const A max = row_max(z);
    double sum = 0;
    for_each_tile(z.columns, [&](const Tile& tile) {
      sum += scaled_exp_sum_tile(z.read(tile), max, scale);
    });
    out[row] = static_cast<A>(1 / sum);
  }
}

// The storage type is chosen per call of a block of rows, far outside the loops.
void forward_any(const ForwardRows<float>& args, int64_t begin, int64_t end, BlockSums* sums,
                 float* column_sums, float* scratch) {
  switch (args.logits.storage) {
    case Storage::kHalf:
      return forward_rows<float, Half>(args, begin, end, sums, column_sums, scratch);
    case Storage::kBFloat16:
      return forward_rows<float, BFloat16>(args, begin, end, sums, column_sums, scratch);
    default:
      return forward_rows<float, float>(args, begin, end, sums, column_sums, scratch);
  }
}

void backward_any(const BackwardRows<float>& args, int64_t begin, int64_t end, float* scratch) {
  switch (args.logits.storage) {
    case Storage::kHalf:
      return backward_rows<float, Half>(args, begin, end, scratch);
    case Storage::kBFloat16:
      return backward_rows<float, BFloat16>(args, begin, end, scratch);
    default:
      return backward_rows<float, float>(args, begin, end, scratch);
  }
}

void max_softmax_any(const LogitsView& logits, double scale, int64_t begin, int64_t end,
                     float* scratch, float* out) {
  switch (logits.storage) {
    case Storage::kHalf:
      return max_softmax_rows<float, Half>(logits, scale, begin, end, scratch, out);
    case Storage::kBFloat16:
      return max_softmax_rows<float, BFloat16>(logits, scale, begin, end, scratch, out);
    default:
      return max_softmax_rows<float, float>(logits, scale, begin, end, scratch, out);
  }
}

constexpr UeoLoops<float> kFloatLoops = {forward_any, marginal<float>, log_marginal<float>,
                                         backward_any, max_softmax_any};
constexpr UeoLoops<double> kDoubleLoops = {forward_rows<double, double>, marginal<double>,
                                           log_marginal<double>, backward_rows<double, double>,
                                           max_softmax_rows<double, double>};

}  // namespace

#define UEO_FAST_CONCATENATE(a, b) a##b
#define UEO_FAST_NAME(base, level) UEO_FAST_CONCATENATE(base, level)

const UeoLoops<float>& UEO_FAST_NAME(float_loops_, UEO_FAST_LEVEL)() { return kFloatLoops; }
const UeoLoops<double>& UEO_FAST_NAME(double_loops_, UEO_FAST_LEVEL)() { return kDoubleLoops; }

}  // namespace ueo_fast::cpu
