// How long a module takes on the GPU present, for tools that choose tiles: no ONNX Runtime.
#pragma once

#include "description.h"

namespace fcm {

// Microseconds of one launch among many back to back, on random tensors that stay in L2 if they fit; the median of
// several rounds. `shape` is X's. Uses the current CUDA context, or else the primary one of GPU 0. Compiling runs in
// parallel with other calls, measuring one call at a time. Throws Error, also where the tile is not one for this GPU.
double measure(Description description, const std::vector<int64_t>& x_shape);

}  // namespace fcm
