// Python module of the tests: the CUDA kernels of csrc/cuda on the host, on numpy arrays, for a GPU
// that the test makes up. Half and bfloat16 travel as 16-bit patterns. Outputs are written to arrays
// of the caller's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "calls.h"

namespace py = pybind11;
namespace cuda = ueo_fast::cuda;
using ueo_fast::LogitsView;
using ueo_fast::Storage;

namespace {

template <class F>
void with_storage_type(Storage storage, F&& f) {
  switch (storage) {
    case Storage::kFloat:
      return f(float{});
    case Storage::kDouble:
      return f(double{});
    case Storage::kHalf:
      return f(cuda::Half{});
    case Storage::kBFloat16:
      return f(cuda::BFloat16{});
  }
}

Storage storage_of(const std::string& dtype) {
  static const std::map<std::string, Storage> storages = {{"float32", Storage::kFloat},
                                                          {"float64", Storage::kDouble},
                                                          {"float16", Storage::kHalf},
                                                          {"bfloat16", Storage::kBFloat16}};
  return storages.at(dtype);
}

LogitsView view_of(const py::array& logits, const std::string& dtype) {
  const Storage storage = storage_of(dtype);
  if (logits.ndim() != 2 || logits.itemsize() != cuda::element_bytes(storage) ||
      (logits.shape(1) != 1 && logits.strides(1) != logits.itemsize())) {
    throw std::invalid_argument("logits must be (rows, columns) of " + dtype +
                                ", the columns adjacent");
  }
  return {logits.data(), storage, logits.shape(0), logits.shape(1),
          logits.strides(0) / logits.itemsize()};
}

const void* data_of(const std::optional<py::array>& array) {
  return array ? array->data() : nullptr;
}

void forward(const cuda::Device& device, const py::array& logits, const std::string& dtype,
             const std::optional<py::array>& confidence,
             const std::optional<py::array>& marginal_weights, double trade_off,
             double confidence_scale, double eps, py::array loss, py::array summary,
             py::array marginal, py::array row_stats) {
  const LogitsView view = view_of(logits, dtype);
  cuda_host::Scratch workspace(cuda::forward_workspace(device, view));
  const cuda::ForwardCall call{view,
                               {trade_off, confidence_scale, eps},
                               data_of(confidence),
                               data_of(marginal_weights),
                               loss.mutable_data(),
                               summary.mutable_data(),
                               marginal.mutable_data(),
                               row_stats.mutable_data(),
                               workspace.memory.data()};
  with_storage_type(view.storage, [&](auto element) {
    cuda_host::Launcher launcher;
    cuda::run_forward<decltype(element)>(launcher, device, call);
  });
}

void backward(const cuda::Device& device, const py::array& grad_loss, const py::array& logits,
              const std::string& dtype, const py::array& summary, const py::array& marginal,
              const py::array& row_stats, double trade_off, double eps, py::array grad) {
  const LogitsView view = view_of(logits, dtype);
  const cuda::BackwardCall call{view,
                                {trade_off, 1.0, eps},
                                grad_loss.data(),
                                summary.data(),
                                marginal.data(),
                                row_stats.data(),
                                grad.mutable_data()};
  with_storage_type(view.storage, [&](auto element) {
    cuda_host::Launcher launcher;
    cuda::run_backward<decltype(element)>(launcher, device, call);
  });
}

// What csrc/cuda/ueo_loss.cpp does: forward, and backward for an upstream gradient of 1.
void loss_and_grad(const cuda::Device& device, const py::array& logits, const std::string& dtype,
                   const std::optional<py::array>& confidence,
                   const std::optional<py::array>& marginal_weights, double trade_off,
                   double confidence_scale, double eps, py::array loss, py::array summary,
                   py::array marginal, py::array grad) {
  const LogitsView view = view_of(logits, dtype);
  cuda_host::Scratch workspace(cuda::forward_workspace(device, view));
  cuda_host::Scratch row_stats(view.rows * ueo_fast::kRowStats * sizeof(double));
  const cuda::ForwardCall call{view,
                               {trade_off, confidence_scale, eps},
                               data_of(confidence),
                               data_of(marginal_weights),
                               loss.mutable_data(),
                               summary.mutable_data(),
                               marginal.mutable_data(),
                               row_stats.memory.data(),
                               workspace.memory.data()};
  with_storage_type(view.storage, [&](auto element) {
    using T = decltype(element);
    cuda_host::Launcher launcher;
    cuda::run_forward<T>(launcher, device, call);
    cuda::run_backward<T>(launcher, device,
                          {view, call.options, nullptr, call.summary, call.marginal, call.row_stats,
                           grad.mutable_data()});
  });
}

void max_softmax(const cuda::Device& device, const py::array& logits, const std::string& dtype,
                 double scale, py::array out) {
  const LogitsView view = view_of(logits, dtype);
  with_storage_type(view.storage, [&](auto element) {
    cuda_host::Launcher launcher;
    cuda::run_max_softmax<decltype(element)>(launcher, device, view, scale, out.mutable_data());
  });
}

}  // namespace

PYBIND11_MODULE(cuda_on_host, m) {
  py::class_<cuda::Device>(m, "Device")
      .def(py::init([](int multiprocessors, int threads_per_multiprocessor,
                       int64_t shared_per_block, int64_t shared_per_multiprocessor,
                       int64_t l2_bytes) {
             return cuda::Device{multiprocessors,  threads_per_multiprocessor,
                                 shared_per_block, shared_per_multiprocessor,
                                 l2_bytes};
           }),
           py::kw_only(), py::arg("multiprocessors"), py::arg("threads_per_multiprocessor"),
           py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"), py::arg("l2_bytes"));
  py::class_<cuda::RegisterPlan>(m, "RegisterPlan")
      .def_readonly("fits", &cuda::RegisterPlan::fits)
      .def_readonly("shape", &cuda::RegisterPlan::shape)
      .def_readonly("lanes", &cuda::RegisterPlan::lanes)
      .def_readonly("slots", &cuda::RegisterPlan::slots)
      .def_readonly("teams", &cuda::RegisterPlan::teams)
      .def_readonly("steps", &cuda::RegisterPlan::steps)
      .def_property_readonly("blocks", [](const cuda::RegisterPlan& p) { return p.grid.blocks; })
      .def_property_readonly("shared_bytes",
                             [](const cuda::RegisterPlan& p) { return p.grid.shared_bytes; });
  py::class_<cuda::SharedRowPlan>(m, "SharedRowPlan")
      .def_readonly("fits", &cuda::SharedRowPlan::fits)
      .def_readonly("many", &cuda::SharedRowPlan::many)
      .def_readonly("slots", &cuda::SharedRowPlan::slots)
      .def_readonly("steps", &cuda::SharedRowPlan::steps)
      .def_property_readonly("blocks", [](const cuda::SharedRowPlan& p) { return p.grid.blocks; })
      .def_property_readonly("threads", [](const cuda::SharedRowPlan& p) { return p.grid.threads; })
      .def_property_readonly("shared_bytes",
                             [](const cuda::SharedRowPlan& p) { return p.grid.shared_bytes; });
  py::class_<cuda::RowPlan>(m, "RowPlan")
      .def_readonly("block_team", &cuda::RowPlan::block_team)
      .def_readonly("lanes", &cuda::RowPlan::lanes)
      .def_readonly("teams", &cuda::RowPlan::teams)
      .def_readonly("steps", &cuda::RowPlan::steps)
      .def_readonly("cached", &cuda::RowPlan::cached)
      .def_readonly("columns_shared", &cuda::RowPlan::columns_shared)
      .def_property_readonly("blocks", [](const cuda::RowPlan& p) { return p.grid.blocks; })
      .def_property_readonly("threads", [](const cuda::RowPlan& p) { return p.grid.threads; })
      .def_property_readonly("shared_bytes",
                             [](const cuda::RowPlan& p) { return p.grid.shared_bytes; });
  m.def("register_blocks", &cuda::register_blocks);
  m.def("loop_budgets", [] {
    py::list budgets;
    for (const cuda::LoopBudget& budget : cuda::kLoopBudgets) {
      budgets.append(
          py::make_tuple(budget.kernel, budget.storage, budget.columns, budget.instructions));
    }
    return budgets;
  });
  m.def("plan_registers",
        [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes) {
          const cuda::RowShape row(columns, bytes);
          if (bytes == 8) return cuda::plan_registers<8>(device, row, rows, true, true);
          if (bytes == 4) return cuda::plan_registers<4>(device, row, rows, true, true);
          return cuda::plan_registers<2>(device, row, rows, true, true);
        });
  m.def("plan_shared_rows",
        [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes) {
          const cuda::RowShape row(columns, bytes);
          if (bytes == 8) return cuda::plan_shared_rows<8>(device, row, rows);
          if (bytes == 4) return cuda::plan_shared_rows<4>(device, row, rows);
          return cuda::plan_shared_rows<2>(device, row, rows);
        });
  m.def("plan_statistics",
        [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes) {
          return cuda::plan_rows(device, cuda::RowShape(columns, bytes), rows,
                                 cuda::PerColumn::kPerTeam);
        });
  m.def("set_seed", &cuda_host::set_seed);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("loss_and_grad", &loss_and_grad);
  m.def("max_softmax", &max_softmax);
}
