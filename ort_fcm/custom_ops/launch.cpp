#include "launch.h"

#include <atomic>
#include <climits>

#include "error.h"

namespace fcm {
namespace {

// Every second kernel works from the end of its tensors to their start: what the one before it wrote last, L2 still
// holds.
int backward() {
  static std::atomic<unsigned> launches{0};
  return int(launches.fetch_add(1, std::memory_order_relaxed) & 1);
}

void check_aligned(const void* data, const char* name) {
  if (reinterpret_cast<uintptr_t>(data) % 16) fail(name, " does not start at a multiple of 16 bytes");
}

// Sizes that the kernels hold in 32 bits.
void check_extents(const Spec& spec, const CallShape& shape, MapSize map) {
  const auto check_one = [&](MapSize size, int channels) {
    if (size.height * size.width > INT_MAX / 2 / channels) fail("an image has more than 2^30 elements");
  };
  check_one(map, spec.c_in);
  check_one(shape.sizes.back(), spec.c_out);
}

}  // namespace

Gpu current_gpu() {
  const cuda::Driver& driver = cuda::driver();
  Gpu gpu;
  int device = 0, major = 0, minor = 0;
  cuda::require(driver.current_context(&gpu.context), "asking for the CUDA context");
  if (!gpu.context) fail("no CUDA context is current");
  cuda::require(driver.current_device(&device), "asking for the GPU");
  cuda::require(driver.device_attribute(&major, cuda::kCapabilityMajor, device), "asking for the GPU's capability");
  cuda::require(driver.device_attribute(&minor, cuda::kCapabilityMinor, device), "asking for the GPU's capability");
  cuda::require(driver.device_attribute(&gpu.limits.shared_bytes, cuda::kSharedBytesPerBlock, device),
                "asking for the GPU's shared memory");
  cuda::require(driver.device_attribute(&gpu.multiprocessors, cuda::kMultiprocessors, device),
                "asking for the GPU's multiprocessors");
  gpu.capability = 10 * major + minor;
  gpu.limits.clusters = gpu.capability >= 90;
  gpu.limits.warpgroups = gpu.capability == 90;
  return gpu;
}

std::string architecture(const Gpu& gpu) { return text("sm_", gpu.capability, gpu.capability == 90 ? "a" : ""); }

void launch_module(const Gpu& gpu, const Spec& spec, const CallShape& shape, MapSize in, Params params,
                   const DeviceKernel& kernel, cuda::Stream stream) {
  check_extents(spec, shape, in);
  check_aligned(params.x, "input X"), check_aligned(params.residual, "residual R"), check_aligned(params.y, "output Y");
  check_aligned(params.scale, "factors G");

  const Launch l = launch(spec, shape.batch, in.height, in.width, gpu.multiprocessors, kernel.held());
  const bool many = double(l.tiles_x) * l.tiles_y * double(shape.batch) > INT_MAX;  // thread blocks count tiles
  if (many || l.tiles > INT_MAX || l.grid_y > 65535) fail("the call needs more thread blocks than a launch has");
  params.batch = int(shape.batch), params.in_h = int(in.height), params.in_w = int(in.width);
  params.mid_h = l.mid_h, params.mid_w = l.mid_w, params.out_h = l.out_h, params.out_w = l.out_w;
  params.tiles_x = l.tiles_x, params.tiles_y = l.tiles_y, params.pool_rows = l.pool_rows;
  params.tiles = int(l.tiles), params.backward = backward();

  // From sm_90 on, a kernel's start overlaps the end of the one before it: it waits for that itself.
  cuda::LaunchAttribute attributes[2] = {};
  attributes[0].id = cuda::kProgrammaticStreamSerialization;
  attributes[0].serialization = 1;
  attributes[1].id = cuda::kClusterDimension;
  attributes[1].cluster = {1, 1, unsigned(l.grid_z)};
  const unsigned attribute_count = gpu.capability < 90 ? 0 : l.grid_z > 1 ? 2 : 1;
  const cuda::LaunchConfig config{unsigned(l.grid_x),
                                  unsigned(l.grid_y),
                                  unsigned(l.grid_z),
                                  unsigned(l.threads),
                                  1,
                                  1,
                                  unsigned(l.shared_bytes),
                                  stream,
                                  attributes,
                                  attribute_count};
  void* arguments[] = {&params};
  cuda::require(cuda::driver().launch(&config, kernel.function(), arguments, nullptr), "launching the kernel");
}

}  // namespace fcm
