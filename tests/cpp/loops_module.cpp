// Python module of the tests: the CPU kernels on numpy arrays, at a forced instruction set and
// number of threads, without torch. Half and bfloat16 travel as uint16 bit patterns.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "capability.h"
#include "ueo_loss_driver.h"

namespace py = pybind11;
using namespace ueo_fast;
using namespace ueo_fast::cpu;

namespace {

using MathLoop = void (*)(const void*, void*, int64_t);

}  // namespace

#define UEO_FAST_DECLARE_LEVEL(name, level) void name##level(const void*, void*, int64_t);
#if defined(__x86_64__)
#define UEO_FAST_DECLARE(name)             \
  UEO_FAST_DECLARE_LEVEL(name##_, base)    \
  UEO_FAST_DECLARE_LEVEL(name##_, avx2)    \
  UEO_FAST_DECLARE_LEVEL(name##_, avx512)
#define UEO_FAST_TABLE(name) {#name, {name##_base, name##_avx2, name##_avx512}}
#else
#define UEO_FAST_DECLARE(name) UEO_FAST_DECLARE_LEVEL(name##_, base)
#define UEO_FAST_TABLE(name) {#name, {name##_base}}
#endif
UEO_FAST_DECLARE(exp2_float)
UEO_FAST_DECLARE(exp2_double)
UEO_FAST_DECLARE(log_float)
UEO_FAST_DECLARE(log_double)
UEO_FAST_DECLARE(half_to_float)
UEO_FAST_DECLARE(float_to_half)
UEO_FAST_DECLARE(bfloat16_to_float)
UEO_FAST_DECLARE(float_to_bfloat16)

namespace {

const std::map<std::string, std::vector<MathLoop>> kMathLoops = {
    UEO_FAST_TABLE(exp2_float),        UEO_FAST_TABLE(exp2_double),
    UEO_FAST_TABLE(log_float),         UEO_FAST_TABLE(log_double),
    UEO_FAST_TABLE(half_to_float),     UEO_FAST_TABLE(float_to_half),
    UEO_FAST_TABLE(bfloat16_to_float), UEO_FAST_TABLE(float_to_bfloat16)};

Capability checked(int64_t capability) {
  if (capability < 0 || capability > static_cast<int64_t>(supported_capability())) {
    throw std::invalid_argument("this machine cannot run capability " + std::to_string(capability));
  }
  return static_cast<Capability>(capability);
}

// Applies a function of csrc/cpu/simd_math.h or half.h; `out` is written.
void apply(const std::string& name, const py::array& x, py::array& out, int64_t capability) {
  kMathLoops.at(name).at(static_cast<size_t>(checked(capability)))(x.data(), out.mutable_data(),
                                                                   x.size());
}

ParallelFor on_threads(int64_t threads) {
  return [threads](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> workers;
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t first = n * t / threads;
      const int64_t last = n * (t + 1) / threads;
      if (first < last) workers.emplace_back([&body, first, last] { body(first, last); });
    }
    for (std::thread& worker : workers) worker.join();
  };
}

const std::map<std::string, Storage> kStorage = {{"float32", Storage::kFloat},
                                                 {"float64", Storage::kDouble},
                                                 {"float16", Storage::kHalf},
                                                 {"bfloat16", Storage::kBFloat16}};

template <class A>
py::dict run(const py::array& logits, Storage storage, const std::optional<py::array_t<A>>& confidence,
             const std::optional<py::array_t<A>>& marginal_weights, const UeoOptions& options,
             double grad_loss, bool stream, int64_t capability, int64_t threads) {
  const auto& loops = ueo_loops<A>(checked(capability));
  const int64_t rows = logits.shape(0);
  const int64_t columns = logits.shape(1);
  const LogitsView view{logits.data(),
                        storage,
                        rows,
                        columns,
                        logits.strides(0) / logits.itemsize()};
  py::array_t<A> row_stats({rows, int64_t{kRowStats}});
  py::array_t<A> summary(int64_t{kSummary});
  py::array_t<A> marginal(columns);
  py::array grad(logits.dtype(), std::vector<int64_t>{rows, columns});
  const ForwardRows<A> forward{view, options, confidence ? confidence->data() : nullptr,
                               marginal_weights ? marginal_weights->data() : nullptr,
                               row_stats.mutable_data()};
  const double loss = ueo_forward<A>(loops, forward, summary.mutable_data(),
                                     marginal.mutable_data(), on_threads(threads));
  const BackwardRows<A> backward{view,
                                 options,
                                 grad_loss,
                                 row_stats.data(),
                                 nullptr,
                                 summary.at(int64_t{kConfidenceSum}),
                                 summary.at(int64_t{kMarginalWeightSum}),
                                 grad.mutable_data(),
                                 stream};
  ueo_backward<A>(loops, backward, marginal.data(), on_threads(threads));
  py::dict result;
  result["loss"] = loss;
  result["summary"] = summary;
  result["marginal"] = marginal;
  result["grad"] = grad;
  return result;
}

py::dict ueo_loss(const py::array& logits, const std::string& dtype, int64_t capability,
                  const std::optional<py::array>& confidence,
                  const std::optional<py::array>& marginal_weights, double trade_off,
                  double confidence_scale, double eps, double grad_loss, bool stream,
                  int64_t threads) {
  const UeoOptions options{trade_off, confidence_scale, eps};
  const Storage storage = kStorage.at(dtype);
  if (storage == Storage::kDouble) {
    return run<double>(logits, storage, confidence, marginal_weights, options, grad_loss, stream,
                       capability, threads);
  }
  return run<float>(logits, storage, confidence, marginal_weights, options, grad_loss, stream,
                    capability, threads);
}

}  // namespace

PYBIND11_MODULE(ueo_fast_loops, m) {
  m.def("supported_capability", [] { return static_cast<int64_t>(supported_capability()); });
  m.def("apply", &apply, py::arg("name"), py::arg("x"), py::arg("out"), py::arg("capability"));
  m.def("ueo_loss", &ueo_loss, py::arg("logits"), py::arg("dtype"), py::arg("capability"),
        py::arg("confidence") = std::nullopt, py::arg("marginal_weights") = std::nullopt,
        py::arg("trade_off") = 1.0, py::arg("confidence_scale") = 1.0, py::arg("eps") = 0.0,
        py::arg("grad_loss") = 1.0, py::arg("stream") = false, py::arg("threads") = 1);
}
