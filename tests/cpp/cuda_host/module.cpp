// Python module for the tests: runs the CUDA kernels of csrc/cuda on the host, on numpy arrays, for an
// invented GPU. Half and bfloat16 are passed as 16-bit patterns. Outputs are written to the caller's
// arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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
  if (logits.ndim() != 2 || logits.itemsize() != ueo_fast::bytes_of(storage) ||
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

// Each returns how many kernels it launched.
int forward(const cuda::Device& device, const py::array& logits, const std::string& dtype,
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
  cuda_host::Launcher launcher;
  with_storage_type(view.storage, [&](auto element) {
    cuda::run_forward<decltype(element)>(launcher, device, call);
  });
  return launcher.launches;
}

int backward(const cuda::Device& device, const py::array& grad_loss, const py::array& logits,
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
  cuda_host::Launcher launcher;
  with_storage_type(view.storage, [&](auto element) {
    cuda::run_backward<decltype(element)>(launcher, device, call);
  });
  return launcher.launches;
}

// What csrc/cuda/ueo_loss.cpp does: forward, and backward for an upstream gradient of 1.
int loss_and_grad(const cuda::Device& device, const py::array& logits, const std::string& dtype,
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
  cuda_host::Launcher launcher;
  with_storage_type(view.storage, [&](auto element) {
    using T = decltype(element);
    cuda::run_forward<T>(launcher, device, call);
    cuda::run_backward<T>(launcher, device,
                          {view, call.options, nullptr, call.summary, call.marginal, call.row_stats,
                           grad.mutable_data()});
  });
  return launcher.launches;
}

int max_softmax(const cuda::Device& device, const py::array& logits, const std::string& dtype,
                double scale, py::array out) {
  const LogitsView view = view_of(logits, dtype);
  cuda_host::Launcher launcher;
  with_storage_type(view.storage, [&](auto element) {
    cuda::run_max_softmax<decltype(element)>(launcher, device, view, scale, out.mutable_data());
  });
  return launcher.launches;
}

template <class F>
auto with_element_bytes(int bytes, F&& f) {
  if (bytes == 8) return f.template operator()<8>();
  if (bytes == 4) return f.template operator()<4>();
  return f.template operator()<2>();
}

// (lanes, slots) of the kernels that hold rows in registers; none for double.
std::vector<std::pair<int, int>> register_shapes(int bytes) {
  std::vector<std::pair<int, int>> shapes;
  if (bytes == 8) return shapes;
  with_element_bytes(bytes, [&]<int kBytes>() {
    for (const cuda::RegisterShape& shape : cuda::kRegisterShapes<kBytes>) {
      shapes.emplace_back(shape.lanes, shape.slots);
    }
  });
  return shapes;
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
      .def_property_readonly("threads", [](const cuda::RegisterPlan& p) { return p.grid.threads; })
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
  py::class_<cuda::MarginalPlan>(m, "MarginalPlan")
      .def_readonly("tile_lanes", &cuda::MarginalPlan::tile_lanes)
      .def_property_readonly("blocks", [](const cuda::MarginalPlan& p) { return p.grid.blocks; })
      .def_property_readonly("threads", [](const cuda::MarginalPlan& p) { return p.grid.threads; })
      .def_property_readonly("shared_bytes",
                             [](const cuda::MarginalPlan& p) { return p.grid.shared_bytes; });
  py::enum_<cuda::PerColumn>(m, "PerColumn")
      .value("none", cuda::PerColumn::kNone)
      .value("per_block", cuda::PerColumn::kPerBlock)
      .value("per_team", cuda::PerColumn::kPerTeam);
  m.def("register_shapes", &register_shapes);
  m.def(
      "plan_registers",
      [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes, bool plain,
         bool sums_per_team) {
        const cuda::RowShape row(columns, bytes);
        return with_element_bytes(bytes, [&]<int kBytes>() {
          return cuda::plan_registers<kBytes>(device, row, rows, plain, sums_per_team);
        });
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::kw_only(), py::arg("plain") = true,
      py::arg("sums_per_team") = true);
  m.def("plan_shared_rows",
        [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes) {
          return with_element_bytes(bytes, [&]<int kBytes>() {
            return cuda::plan_shared_rows<kBytes>(device, cuda::RowShape(columns, bytes), rows);
          });
        });
  m.def(
      "plan_rows",
      [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes,
         cuda::PerColumn per_column) {
        return cuda::plan_rows(device, cuda::RowShape(columns, bytes), rows, per_column);
      },
      py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg("per_column") = cuda::PerColumn::kPerTeam);
  m.def("plan_marginal", &cuda::plan_marginal);
  m.def("partials", [](const cuda::Device& device, int64_t rows, int64_t columns,
                       const std::string& dtype, bool plain) {
    const LogitsView view{nullptr, storage_of(dtype), rows, columns, columns};
    return cuda::StatisticsPlan(device, view, plain).partials();
  });
  m.def("set_seed", &cuda_host::set_seed);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("loss_and_grad", &loss_and_grad);
  m.def("max_softmax", &max_softmax);
}
