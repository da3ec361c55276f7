// A module's kernel on its way to a stream: the one place that knows how it is launched.
#pragma once

#include <string>

#include "cuda_driver.h"
#include "device_kernel.h"
#include "specialise.h"

namespace fcm {

// The GPU whose context is current.
struct Gpu {
  cuda::Context context = nullptr;
  int capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  Limits limits{};
};

Gpu current_gpu();  // throws Error if there is none

std::string architecture(const Gpu& gpu);  // as NVRTC names it

// Launches `kernel`, compiled for `spec`, on `stream`, for X of `map` pixels. Of `params`, the tensors and weights
// are set; a batch of 0 is not for it. Throws Error.
void launch_module(const Gpu& gpu, const Spec& spec, const CallShape& shape, MapSize map, Params params,
                   const DeviceKernel& kernel, cuda::Stream stream);

}  // namespace fcm
