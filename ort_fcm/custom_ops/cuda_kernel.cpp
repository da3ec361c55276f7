// The module on a GPU. Creation checks the node, packs and uploads the weights and starts compiling; the first compute
// call, which is never part of a graph capture, waits for the kernel and loads it. After that, compute only launches.
#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>

#include "device_kernel.h"
#include "kernel.h"
#include "kernels/pack.h"
#include "specialise.h"

namespace fcm {
namespace {

constexpr size_t kAlignment = 256;
constexpr int kResourceVersion = 3, kUseTf32 = 10011;

// The GPU whose context is current.
struct Gpu {
  cuda::Context context = nullptr;
  int capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  Limits limits{};
};

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
  return gpu;
}

std::string architecture(const Gpu& gpu) { return text("sm_", gpu.capability, gpu.capability == 90 ? "a" : ""); }

void warn(const ort::KernelInfo* info, const std::string& message) {
  const ort::Logger* logger = nullptr;
  if (ort::succeeded(ort::kernel_logger(info, &logger)) && logger)
    ort::succeeded(ort::log_message(logger, ort::kWarning, message.c_str(), __FILE__, __LINE__, "fcm"));
}

// All weights of a module in one block of memory, and which pointers of Params go where in it.
class PackedWeights {
 public:
  template <class T, class Pack>
  void add(T* Params::* field, size_t bytes, Pack pack) {
    const size_t offset = (block_.size() + kAlignment - 1) / kAlignment * kAlignment;
    block_.resize(offset + bytes);
    pack(block_.data() + offset);
    places_.push_back([=](Params& params, uintptr_t start) { params.*field = reinterpret_cast<T*>(start + offset); });
  }
  void add_vector(const Spec& spec, const float* Params::* field, const std::vector<float>& values, bool project) {
    const int length = padded_vector(spec, project);
    add(field, size_t(length) * 4, [&](void* out) {
      pack_vector(values.empty() ? nullptr : values.data(), int(values.size()), length, static_cast<float*>(out));
    });
  }

  const std::string& block() const { return block_; }

  // The pointers, once the block is at `start`.
  Params params(uintptr_t start) const {
    Params params{};
    for (const auto& place : places_) place(params, start);
    return params;
  }

 private:
  std::string block_;
  std::vector<std::function<void(Params&, uintptr_t)>> places_;
};

void pack(const Module& module, const Spec& spec, PackedWeights& out) {
  for (size_t i = 0; i < module.stages.size(); ++i) {
    const Stage& stage = module.stages[i];
    const float* weight = stage.weight.data();
    const bool prelu = stage.act.kind == Activation::prelu;
    if (stage.kind == StageKind::depthwise) {
      out.add(&Params::depthwise_weight, packed_depthwise_bytes(spec),
              [&](void* to) { pack_depthwise(spec, weight, to); });
      out.add_vector(spec, &Params::depthwise_bias, stage.bias, false);
      if (prelu) out.add_vector(spec, &Params::depthwise_slope, stage.slope, false);
    } else if (i + 1 == module.stages.size()) {
      out.add(&Params::project_weight, packed_project_bytes(spec), [&](void* to) { pack_project(spec, weight, to); });
      out.add_vector(spec, &Params::project_bias, stage.bias, true);
      if (prelu) out.add_vector(spec, &Params::project_slope, stage.slope, true);
    } else {
      out.add(&Params::first_weight, packed_first_bytes(spec), [&](void* to) { pack_first(spec, weight, to); });
      out.add_vector(spec, &Params::first_bias, stage.bias, false);
      if (prelu) out.add_vector(spec, &Params::first_slope, stage.slope, false);
    }
  }
}

void check_aligned(const void* data, const char* name) {
  if (reinterpret_cast<uintptr_t>(data) % 16) fail(name, " does not start at a multiple of 16 bytes");
}

// Sizes that the kernels hold in 32 bits.
void check_extents(const Spec& spec, const CallShape& shape) {
  const auto check_one = [&](MapSize size, int channels) {
    if (size.height * size.width > INT_MAX / 2 / channels) fail("an image has more than 2^30 elements");
  };
  check_one(shape.sizes.front(), spec.c_in);
  check_one(shape.sizes.back(), spec.c_out);
}

class CudaKernel : public Kernel {
 public:
  CudaKernel(Module module, const ort::KernelInfo* info) : module_(std::move(module)), gpu_(current_gpu()) {
    const char* override = std::getenv("NVIDIA_TF32_OVERRIDE");
    const bool tf32 = gpu_.capability >= 80 && !(override && !std::strcmp(override, "0"));
    const std::string replaced = prepare(module_.half ? Type::float16 : tf32 ? Type::tf32 : Type::float32);
    if (!replaced.empty())
      warn(info, text("FusedConvModule '", module_.node, "': tile '", module_.tile, "' is replaced by '",
                      tile_text(spec_.tile), "': ", replaced));
  }

  const std::string& node() const override { return module_.node; }

  void compute(ort::KernelContext* context) override {
    const CallInputs inputs = call_inputs(module_, context);
    const CallShape& shape = inputs.shape;
    void* const y = call_output(shape, context);
    if (!shape.batch) return;
    if (!ready_.load(std::memory_order_acquire)) load(context);
    check_extents(spec_, shape);
    check_aligned(inputs.x, "input X"), check_aligned(inputs.residual, "residual R"), check_aligned(y, "output Y");

    const Launch l = launch(spec_, shape.batch, shape.sizes[0].height, shape.sizes[0].width, gpu_.multiprocessors);
    if (l.grid_x > INT_MAX || l.grid_y > 65535) fail("the call needs more thread blocks than a launch has");
    Params p = params_;
    p.x = inputs.x, p.y = y, p.residual = inputs.residual;
    p.batch = int(shape.batch), p.in_h = int(shape.sizes[0].height), p.in_w = int(shape.sizes[0].width);
    p.mid_h = l.mid_h, p.mid_w = l.mid_w, p.out_h = l.out_h, p.out_w = l.out_w;
    p.tiles_x = l.tiles_x, p.tiles_y = l.tiles_y;

    void* stream = nullptr;
    check(ort::compute_stream(context, &stream));
    // From sm_90 on, a kernel's start overlaps the end of the one before it: it waits for that itself.
    cuda::LaunchAttribute attributes[2] = {};
    attributes[0].id = cuda::kProgrammaticStreamSerialization;
    attributes[0].serialization = 1;
    attributes[1].id = cuda::kClusterDimension;
    attributes[1].cluster = {1, 1, unsigned(l.cluster_z)};
    const cuda::LaunchConfig config{unsigned(l.grid_x),
                                    unsigned(l.grid_y),
                                    unsigned(l.grid_z),
                                    unsigned(l.threads),
                                    1,
                                    1,
                                    unsigned(l.shared_bytes),
                                    static_cast<cuda::Stream>(stream),
                                    attributes,
                                    gpu_.capability < 90 ? 0u
                                    : l.cluster_z > 1    ? 2u
                                                         : 1u};
    void* arguments[] = {&p};
    cuda::require(cuda::driver().launch(&config, kernel_->function(), arguments, nullptr), "launching the kernel");
  }

 private:
  // Chooses the tile, uploads the weights, starts the compilation. Returns why the node's tile was replaced, if it was.
  std::string prepare(Type type) {
    Fitted fitted = fit_tile(make_spec(module_, type), module_.tile, gpu_.limits);
    spec_ = fitted.spec;
    compilation_ = start_compilation(kernel_source(spec_), architecture(gpu_));
    PackedWeights packed;
    pack(module_, spec_, packed);
    weights_ = std::make_unique<DeviceBuffer>(gpu_.context, packed.block());
    params_ = packed.params(weights_->address());
    return fitted.replaced;
  }

  // ONNX Runtime tells only now whether the session allows TF32.
  static bool allows_tf32(const ort::KernelContext* context) {
    void* value = nullptr;
    return !ort::succeeded(ort::resource(context, kResourceVersion, kUseTf32, &value)) ||
           (reinterpret_cast<uintptr_t>(value) & 0xff);
  }

  void load(const ort::KernelContext* context) {
    std::lock_guard lock(mutex_);
    if (ready_.load(std::memory_order_relaxed)) return;
    if (spec_.type == Type::tf32 && !allows_tf32(context)) prepare(Type::float32);
    kernel_ = load_kernel(*compilation_, gpu_.context, shared_bytes(spec_));
    compilation_.reset();
    for (Stage& stage : module_.stages) stage.weight = {}, stage.bias = {}, stage.slope = {};
    ready_.store(true, std::memory_order_release);
  }

  Module module_;  // its weights until the kernel is loaded
  const Gpu gpu_;
  Spec spec_;
  Params params_{};
  std::unique_ptr<DeviceBuffer> weights_;
  std::shared_ptr<Compilation> compilation_;
  std::shared_ptr<DeviceKernel> kernel_;
  std::mutex mutex_;
  std::atomic<bool> ready_{false};
};

}  // namespace

std::unique_ptr<Kernel> make_cuda_kernel(Module module, const ort::KernelInfo* info) {
  return std::make_unique<CudaKernel>(std::move(module), info);
}

}  // namespace fcm
