// Python module of the tests: the CUDA kernels of channel_affine and layer_norm on the host, on
// numpy arrays, for a GPU that the test makes up. As module.cpp, which has those of the loss.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "affine_calls.h"

namespace py = pybind11;
namespace cuda = ueo_fast::cuda;
using ueo_fast::ChannelLayout;
using ueo_fast::Storage;

namespace {

template <class F>
void with_storage_type(const std::string& dtype, F&& f) {
  if (dtype == "float32") return f(float{}, Storage::kFloat);
  if (dtype == "float64") return f(double{}, Storage::kDouble);
  if (dtype == "float16") return f(cuda::Half{}, Storage::kHalf);
  if (dtype == "bfloat16") return f(cuda::BFloat16{}, Storage::kBFloat16);
  throw std::invalid_argument(dtype);
}

using Array = std::optional<py::array>;

const void* data_of(const Array& array) { return array ? array->data() : nullptr; }
void* output(Array& array) { return array ? array->mutable_data() : nullptr; }

// Bytes per element tell the two dtypes that a parameter may have apart.
cuda::ChannelNumbers<const void*> numbers_of(const py::array& x, const Array& numbers) {
  if (!numbers) return {};
  return {numbers->data(), numbers->itemsize() == x.itemsize()};
}

cuda::ChannelNumbers<void*> gradient_of(const py::array& x, Array& gradient) {
  if (!gradient) return {};
  return {gradient->mutable_data(), gradient->itemsize() == x.itemsize()};
}

// weight, bias, mean, var
cuda::ChannelParameters parameters_of(const py::array& x, const std::array<Array, 4>& numbers,
                                      double eps) {
  return {numbers_of(x, numbers[0]), numbers_of(x, numbers[1]), numbers_of(x, numbers[2]),
          numbers_of(x, numbers[3]), eps};
}

// Both return how many kernels they launched.
int channel_affine_forward(const cuda::Device& device, const ChannelLayout& layout,
                           const std::string& dtype, const py::array& x,
                           const std::array<Array, 4>& numbers, double eps, const Array& residual,
                           bool relu, py::array out, Array bits) {
  const cuda::AffineForwardCall call{
      layout, x.data(),           parameters_of(x, numbers, eps), data_of(residual),
      relu,   out.mutable_data(), output(bits)};
  cuda_host::Launcher launcher;
  with_storage_type(dtype, [&](auto element, Storage) {
    cuda::run_channel_affine<decltype(element)>(launcher, device, call);
  });
  return launcher.launches;
}

int channel_affine_backward(const cuda::Device& device, const ChannelLayout& layout,
                            const std::string& dtype, const py::array& grad_out, const Array& x,
                            const std::array<Array, 4>& numbers, double eps, const Array& bits,
                            bool relu, Array grad_x, Array grad_weight, Array grad_bias,
                            Array grad_residual) {
  cuda_host::Launcher launcher;
  with_storage_type(dtype, [&](auto element, Storage storage) {
    cuda_host::Scratch workspace(cuda::affine_backward_workspace(device, layout, storage));
    cuda::run_channel_affine_gradient<decltype(element)>(
        launcher, device,
        {layout, grad_out.data(), data_of(x), parameters_of(grad_out, numbers, eps), data_of(bits),
         relu, output(grad_x), gradient_of(grad_out, grad_weight),
         gradient_of(grad_out, grad_bias), output(grad_residual), workspace.memory.data()});
  });
  return launcher.launches;
}

cuda::NormRows rows_of(const py::array& x) {
  if (x.ndim() != 2 || (x.shape(1) != 1 && x.strides(1) != x.itemsize())) {
    throw std::invalid_argument("rows must be (rows, columns), the columns adjacent");
  }
  return {x.data(), x.shape(0), x.shape(1), x.strides(0) / x.itemsize()};
}

void layer_norm_forward(const cuda::Device& device, const std::string& dtype, const py::array& x,
                        const Array& weight, const Array& bias, double eps, py::array out,
                        py::array mean, py::array rstd) {
  with_storage_type(dtype, [&](auto element, Storage) {
    cuda_host::Launcher launcher;
    cuda::run_layer_norm<decltype(element)>(
        launcher, device,
        {rows_of(x), data_of(weight), data_of(bias), eps, out.mutable_data(), mean.mutable_data(),
         rstd.mutable_data()});
  });
}

void layer_norm_backward(const cuda::Device& device, const std::string& dtype,
                         const py::array& grad_out, const py::array& x, const py::array& mean,
                         const py::array& rstd, const Array& weight, Array grad_x, Array sums) {
  with_storage_type(dtype, [&](auto element, Storage storage) {
    cuda_host::Launcher launcher;
    const cuda::NormRows rows = rows_of(x);
    cuda_host::Scratch workspace(
        cuda::norm_backward_workspace(device, rows.rows, rows.columns, storage));
    cuda::run_layer_norm_gradient<decltype(element)>(
        launcher, device,
        {rows_of(grad_out), rows, mean.data(), rstd.data(), data_of(weight), output(grad_x),
         output(sums), workspace.memory.data()});
  });
}

}  // namespace

PYBIND11_MODULE(cuda_affine_on_host, m) {
  // Local: module.cpp has the same class.
  py::class_<cuda::Device>(m, "Device", py::module_local())
      .def(py::init([](int multiprocessors, int threads_per_multiprocessor,
                       int64_t shared_per_block, int64_t shared_per_multiprocessor,
                       int64_t l2_bytes) {
             return cuda::Device{multiprocessors,  threads_per_multiprocessor,
                                 shared_per_block, shared_per_multiprocessor,
                                 l2_bytes};
           }),
           py::kw_only(), py::arg("multiprocessors"), py::arg("threads_per_multiprocessor"),
           py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"), py::arg("l2_bytes"));
  py::class_<ChannelLayout>(m, "ChannelLayout")
      .def(py::init([](int64_t outer, int64_t channels, int64_t inner) {
        return ChannelLayout{outer, channels, inner};
      }))
      .def_readonly("outer", &ChannelLayout::outer)
      .def_readonly("channels", &ChannelLayout::channels)
      .def_readonly("inner", &ChannelLayout::inner);
  m.def("channel_layout", [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                             int64_t dim) {
    return ueo_fast::channel_layout(sizes.data(), strides.data(),
                                    static_cast<int64_t>(sizes.size()), dim);
  });
  py::class_<cuda::AffinePlan>(m, "AffinePlan")
      .def_readonly("period", &cuda::AffinePlan::period)
      .def_readonly("width", &cuda::AffinePlan::width)
      .def_readonly("lines", &cuda::AffinePlan::lines)
      .def_readonly("tiles", &cuda::AffinePlan::tiles)
      .def_readonly("chunks", &cuda::AffinePlan::chunks)
      .def_readonly("steps", &cuda::AffinePlan::steps)
      .def_readonly("one_channel", &cuda::AffinePlan::one_channel)
      .def_readonly("segments", &cuda::AffinePlan::segments)
      .def_readonly("segment_lanes", &cuda::AffinePlan::segment_lanes)
      .def_property_readonly("blocks", [](const cuda::AffinePlan& p) { return p.grid.blocks; })
      .def_property_readonly("threads", [](const cuda::AffinePlan& p) { return p.grid.threads; })
      .def_property_readonly("shared_bytes",
                             [](const cuda::AffinePlan& p) { return p.grid.shared_bytes; });
  m.def("plan_affine", &cuda::plan_affine);
  py::class_<cuda::RowPlan>(m, "RowPlan", py::module_local())
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
  m.def("plan_norm_forward",
        [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes) {
          return cuda::plan_norm_forward(device, cuda::RowShape(columns, bytes), rows);
        });
  m.def("plan_norm_backward",
        [](const cuda::Device& device, int64_t rows, int64_t columns, int bytes) {
          return cuda::plan_norm_backward(device, cuda::RowShape(columns, bytes), rows, true);
        });
  m.def("quotient", [](int64_t a, int64_t b) { return cuda::quotient(a, cuda::Divisor(b)); });
  m.def("set_seed", &cuda_host::set_seed);
  m.def("channel_affine_forward", &channel_affine_forward);
  m.def("channel_affine_backward", &channel_affine_backward);
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
}
