// Launches kernels of csrc/cuda on the host, as their launch code does on a GPU.
#pragma once

#include "scheduler.h"

namespace cuda_host {

struct Launcher {
  int launches = 0;

  template <class... Parameters, class AnyGrid, class... Arguments>
  void run(void (*kernel)(Parameters...), const AnyGrid& grid, const Arguments&... arguments) {
    const Grid host{static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads),
                    static_cast<size_t>(grid.shared_bytes)};
    ++launches;
    launch(host, [&] { kernel(arguments...); }, reinterpret_cast<const void*>(kernel));
  }
};

}  // namespace cuda_host
