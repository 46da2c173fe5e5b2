// Python module of the shim's own tests: sample kernels, right and wrong; each function runs one.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <vector>

#include "launcher.h"
#include "samples.cuh"

namespace py = pybind11;
namespace cuda = ueo_fast::cuda;
namespace samples = cuda::samples;
using cuda_host::Grid;
using cuda_host::launch;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- Right ones ------------------------------------------------------------------------------
Floats block_sum(const Floats& x, unsigned blocks, unsigned threads, unsigned shared_bytes) {
  Floats out(blocks);
  cuda_host::Launcher().run(samples::block_sum, Grid{blocks, threads, shared_bytes}, x.data(),
                            out.mutable_data());
  return out;
}

float sum_of_blocks(const Floats& x) {
  std::vector<float> partial(x.size());
  unsigned finished = 0;
  float out = 0;
  cuda_host::Launcher().run(samples::sum_of_blocks,
                            Grid{static_cast<unsigned>(x.size()), 32, sizeof(unsigned)}, x.data(),
                            partial.data(), &finished, &out);
  return out;
}

// What each lane of a warp gets, in the type T.
template <class T>
py::array_t<T> shuffle(unsigned threads, bool is_xor, int argument, unsigned mask) {
  py::array_t<T> out(threads);
  T* got = out.mutable_data();
  launch({1, threads}, [=] {
    const T mine = static_cast<T>(threadIdx.x) + static_cast<T>(0.25);
    got[threadIdx.x] = -1;
    if ((mask >> threadIdx.x % 32 & 1) == 0) return;
    got[threadIdx.x] = is_xor ? __shfl_xor_sync(mask, mine, argument)
                              : __shfl_sync(mask, mine, argument);
  });
  return out;
}

std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order;
  launch({blocks, 1}, [&] { order.push_back(blockIdx.x); });
  return order;
}

std::vector<unsigned> thread_order(unsigned threads) {
  std::vector<unsigned> order;
  launch({1, threads}, [&] { order.push_back(threadIdx.x); });
  return order;
}

Floats poison(unsigned count) {
  Floats out(count);
  float* got = out.mutable_data();
  launch({1, 1, 4 * count}, [=] {
    const auto* shared = reinterpret_cast<const float*>(cuda::shared_memory());
    for (unsigned i = 0; i < count; ++i) got[i] = shared[i];
  });
  return out;
}

template <class T>
py::array_t<uint16_t> round_to(const Floats& x) {
  py::array_t<uint16_t> out(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    out.mutable_data()[i] = cuda::to_storage<T>(x.data()[i]).bits;
  }
  return out;
}

template <class T>
Floats widen(const py::array_t<uint16_t>& x) {
  Floats out(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    out.mutable_data()[i] = cuda::to_compute(T{x.data()[i]});
  }
  return out;
}

// ---- Wrong ones ------------------------------------------------------------------------------
// Two copies into shared memory, which is read after waiting for them, or before.
Floats copy_two(const Floats& x, bool waits) {
  Floats out(8);
  float* got = out.mutable_data();
  alignas(16) float from[8];
  std::copy(x.data(), x.data() + 8, from);
  launch({1, 1, 32}, [&] {
    auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
    for (int i = 0; i < 2; ++i) cuda::copy_async(shared + 4 * i, from + 4 * i);
    if (waits) cuda::copies_wait();
    for (int i = 0; i < 8; ++i) got[i] = shared[i];
    cuda::copies_wait();
  });
  return out;
}

void copy_without_wait() {
  alignas(16) static const float from[4] = {};
  launch({1, 32, 16}, [] {
    if (threadIdx.x == 5) cuda::copy_async(cuda::shared_memory(), from);
  });
}

void copy_to(int64_t target_offset, int64_t source_offset) {
  alignas(16) static const unsigned char from[64] = {};
  launch({1, 1, 32}, [=] {
    cuda::copy_async(cuda::shared_memory() + target_offset, from + source_offset);
    cuda::copies_wait();
  });
}

void write_beyond_shared_memory(unsigned bytes) {
  launch({2, 32, bytes}, [=] {
    if (blockIdx.x == 1 && threadIdx.x == 3) cuda::shared_memory()[bytes] = 1;
  });
}

void divergent_block() {
  launch({2, 64}, [] {
    if (threadIdx.x != 40) __syncthreads();
  });
}

void divergent_warp() {
  launch({1, 64}, [] {
    if (threadIdx.x != 40) __shfl_xor_sync(kAll, 1.0f, 1);
  });
}

void crossed_meetings() {
  launch({1, 64}, [] {
    if (threadIdx.x < 10) {
      __shfl_sync(kAll, 1.0f, 0);
    } else {
      __syncthreads();
    }
  });
}

void crossed_shuffles() {
  launch({1, 32}, [] {
    if (threadIdx.x == 7) {
      __shfl_sync(kAll, 1.0f, 0);
    } else {
      __shfl_xor_sync(kAll, 1.0f, 1);
    }
  });
}

void shuffle_outside_of_the_mask() {
  launch({1, 32}, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1.0f, 16);
  });
}

void throw_in_thread() {
  launch({3, 64}, [] {
    __syncthreads();
    if (blockIdx.x == 1 && threadIdx.x == 9) throw std::out_of_range("thrown by thread 9");
    __syncthreads();
  });
}

// ---- Costs -----------------------------------------------------------------------------------
// Microseconds per repetition: a barrier of a block, a shuffle of a warp, an empty launch.
double cost(const std::string& what, unsigned threads, int repetitions) {
  const auto start = std::chrono::steady_clock::now();
  if (what == "launch") {
    for (int i = 0; i < repetitions; ++i) launch({1, threads}, [] {});
  } else if (what == "barrier") {
    launch({1, threads}, [=] {
      for (int i = 0; i < repetitions; ++i) __syncthreads();
    });
  } else {
    launch({1, threads}, [=] {
      for (int i = 0; i < repetitions; ++i) __shfl_xor_sync(kAll, 1.0f, 1);
    });
  }
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / repetitions;
}

}  // namespace

PYBIND11_MODULE(cuda_host_samples, m) {
  m.def("set_seed", &cuda_host::set_seed);
  m.def("block_sum", &block_sum);
  m.def("sum_of_blocks", &sum_of_blocks);
  m.def("shuffle_float", &shuffle<float>);
  m.def("shuffle_double", &shuffle<double>);
  m.def("block_order", &block_order);
  m.def("thread_order", &thread_order);
  m.def("poison", &poison);
  m.def("round_to_half", &round_to<cuda::Half>);
  m.def("round_to_bfloat16", &round_to<cuda::BFloat16>);
  m.def("widen_half", &widen<cuda::Half>);
  m.def("widen_bfloat16", &widen<cuda::BFloat16>);
  m.def("copy_two", &copy_two);
  m.def("copy_without_wait", &copy_without_wait);
  m.def("copy_to", &copy_to);
  m.def("write_beyond_shared_memory", &write_beyond_shared_memory);
  m.def("divergent_block", &divergent_block);
  m.def("divergent_warp", &divergent_warp);
  m.def("crossed_meetings", &crossed_meetings);
  m.def("crossed_shuffles", &crossed_shuffles);
  m.def("shuffle_outside_of_the_mask", &shuffle_outside_of_the_mask);
  m.def("throw_in_thread", &throw_in_thread);
  m.def("cost", &cost);
}
