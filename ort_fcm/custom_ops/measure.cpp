#include "measure.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <random>

#include "device_kernel.h"
#include "error.h"
#include "kernels/half.h"
#include "launch.h"
#include "packed_weights.h"

namespace fcm {
namespace {

constexpr int kWarmups = 4, kRounds = 9, kLeastLaunches = 4, kMostLaunches = 40;
constexpr double kRoundUs = 2000;  // of a round, where kLeastLaunches do not take longer
constexpr size_t kPattern = 1 << 20;

cuda::Context context_to_use() {
  const cuda::Driver& driver = cuda::driver();
  cuda::Context current = nullptr;
  cuda::require(driver.current_context(&current), "asking for the CUDA context");
  if (current) return current;
  static const cuda::Context primary = [&] {  // kept, for calls to come
    cuda::Context context = nullptr;
    int device = 0;
    cuda::require(driver.device(&device, 0), "asking for GPU 0");
    cuda::require(driver.retain_primary_context(&context, device), "opening GPU 0");
    return context;
  }();
  return primary;
}

void fill_weights(Module& module) {
  std::minstd_rand random;
  std::uniform_real_distribution<float> distribution(-1, 1);
  const auto fill = [&](std::vector<float>& values, size_t count, float scale) {
    values.resize(count);
    for (float& value : values) value = scale * distribution(random);
  };
  for (Stage& stage : module.stages) {
    const size_t depth = size_t(stage.kind == StageKind::depthwise ? 1 : stage.in_channels) * stage.window.kernel_h *
                         stage.window.kernel_w;
    fill(stage.weight, stage.out_channels * depth, std::sqrt(6.f / float(depth)));  // outputs of the order of inputs
    fill(stage.bias, stage.out_channels, 0.5f);
    if (stage.act.kind == Activation::prelu) fill(stage.slope, stage.out_channels, 0.5f);
  }
}

std::string random_elements(bool half) {
  std::minstd_rand random;
  std::uniform_real_distribution<float> distribution(-1, 1);
  std::string out(kPattern, '\0');
  const size_t element = half ? 2 : 4;
  for (size_t at = 0; at < out.size(); at += element) {
    const float value = distribution(random);
    const uint16_t rounded = float_to_half(value);
    std::memcpy(out.data() + at, half ? static_cast<const void*>(&rounded) : &value, element);
  }
  return out;
}

// Something of the driver's that is destroyed at the end of a scope.
template <class Handle>
struct Owned {
  explicit Owned(int (*destroy)(Handle)) : destroy_(destroy) {}
  ~Owned() {
    if (handle) destroy_(handle);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Handle handle{};

 private:
  int (*destroy_)(Handle);
};

class Stopwatch {
 public:
  Stopwatch() : start_(cuda::driver().destroy_event), stop_(cuda::driver().destroy_event) {
    cuda::require(cuda::driver().create_event(&start_.handle, 0), "creating an event");
    cuda::require(cuda::driver().create_event(&stop_.handle, 0), "creating an event");
  }

  // Microseconds of what `work` puts on `stream`.
  template <class Work>
  double time(cuda::Stream stream, Work work) {
    const cuda::Driver& driver = cuda::driver();
    cuda::require(driver.record_event(start_.handle, stream), "recording an event");
    work();
    cuda::require(driver.record_event(stop_.handle, stream), "recording an event");
    cuda::require(driver.synchronise_stream(stream), "running the kernel");
    float milliseconds = 0;
    cuda::require(driver.elapsed(&milliseconds, start_.handle, stop_.handle), "reading an event");
    return 1000.0 * milliseconds;
  }

 private:
  Owned<cuda::Event> start_, stop_;
};

template <class Work>
void capture(cuda::Stream stream, cuda::GraphExec* executable, Work work) {
  const cuda::Driver& driver = cuda::driver();
  Owned<cuda::Graph> graph(driver.destroy_graph);
  cuda::require(driver.begin_capture(stream, cuda::kRelaxed), "capturing a graph");
  try {
    work();
  } catch (...) {
    driver.end_capture(stream, &graph.handle);
    throw;
  }
  cuda::require(driver.end_capture(stream, &graph.handle), "capturing a graph");
  cuda::require(driver.instantiate_graph(executable, graph.handle, 0), "instantiating a graph");
}

// Microseconds of one of many `launch(stream)`.
template <class Work>
double time_launches(Work launch) {
  const cuda::Driver& driver = cuda::driver();
  Owned<cuda::Stream> stream(driver.destroy_stream);
  cuda::require(driver.create_stream(&stream.handle, cuda::kNonBlocking), "creating a stream");
  Stopwatch watch;
  const auto once = [&] { launch(stream.handle); };
  watch.time(stream.handle, once);
  const double first = std::max(watch.time(stream.handle, once), 1.0);
  const int launches = int(std::clamp<double>(kRoundUs / first, kLeastLaunches, kMostLaunches));

  Owned<cuda::GraphExec> graph(driver.destroy_graph_exec);
  capture(stream.handle, &graph.handle, [&] {
    for (int i = 0; i < launches; ++i) once();
  });
  std::vector<double> rounds;
  for (int i = 0; i < kWarmups + kRounds; ++i) {
    const double round = watch.time(
        stream.handle, [&] { cuda::require(driver.launch_graph(graph.handle, stream.handle), "launching a graph"); });
    if (i >= kWarmups) rounds.push_back(round);
  }
  std::nth_element(rounds.begin(), rounds.begin() + kRounds / 2, rounds.end());
  return rounds[kRounds / 2] / launches;
}

}  // namespace

double measure(Description description, const std::vector<int64_t>& x_shape) {
  Module module = staged(std::move(description.module));
  const cuda::Context context = context_to_use();
  const cuda::Current current(context);
  const Gpu gpu = current_gpu();
  const CallShape shape = call_shape(module, x_shape);
  if (!shape.batch) fail("there is nothing to measure for a batch of 0");
  const auto [spec, replaced] = fit_tile(make_spec(module, description.type), module.tile, gpu.limits);
  if (!replaced.empty()) fail("tile '", module.tile, "' is not for this GPU: ", replaced);
  const auto compilation = start_compilation(kernel_source(spec), architecture(gpu));
  fill_weights(module);
  const PackedWeights packed(module, spec);
  compilation->cubin.wait();

  static std::mutex& one_at_a_time = *new std::mutex;
  const std::lock_guard lock(one_at_a_time);
  const auto kernel = load_kernel(*compilation, context, threads(spec), shared_bytes(spec));
  const DeviceBuffer weights(context, packed.block());
  const auto bytes = [&](const std::vector<int64_t>& dims) {
    size_t count = element_bytes(spec.type);
    for (const int64_t n : dims) count *= size_t(n);
    return count;
  };
  const std::string pattern = random_elements(module.half);
  const DeviceBuffer x(context, pattern, bytes(x_shape));
  const DeviceBuffer residual(context, pattern, module.residual ? bytes(shape.output_shape) : 1);
  const MapSize map{x_shape[module.input_nchw ? 2 : 1], x_shape[module.input_nchw ? 3 : 2]};
  const int rows = launch(spec, shape.batch, map.height, map.width).pool_rows;
  const DeviceBuffer scale(context, pattern, module.scaled ? bytes({shape.batch, spec.c_in}) : 1);
  const DeviceBuffer pool(context, pattern, module.pool ? bytes(pool_shape(module, shape.batch, rows)) : 1);
  const DeviceBuffer y(context, pattern, bytes(shape.output_shape));
  const auto pointer = [](const DeviceBuffer& buffer) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(buffer.address()));
  };
  Params params = packed.params(weights.address());
  params.x = pointer(x), params.y = pointer(y), params.residual = module.residual ? pointer(residual) : nullptr;
  params.scale = pointer(scale), params.pool = pointer(pool);
  return time_launches([&](cuda::Stream stream) { launch_module(gpu, spec, shape, map, params, *kernel, stream); });
}

}  // namespace fcm
