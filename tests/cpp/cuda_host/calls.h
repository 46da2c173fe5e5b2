// The kernels of the loss called on host memory, as the glue calls them on a GPU's.
#pragma once

#include <cmath>
#include <vector>

#include "launcher.h"
#include "ueo_loss_launch.cuh"

namespace cuda_host {

// Scratch as a GPU's memory has it: full of what others left.
struct Scratch {
  std::vector<double> memory;
  explicit Scratch(int64_t bytes) : memory(bytes / sizeof(double) + 1, std::nan("")) {}
};

}  // namespace cuda_host
