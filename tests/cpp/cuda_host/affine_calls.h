// The kernels of channel_affine and layer_norm called on host memory, as the glue calls them on a
// GPU's.
#pragma once

#include "calls.h"
#include "channel_affine_launch.cuh"
#include "layer_norm_launch.cuh"
