// The module on a GPU. Creation checks the node, packs and uploads the weights and starts compiling; the first compute
// call, which is never part of a graph capture, waits for the kernel and loads it. After that, compute only launches.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "device_kernel.h"
#include "kernel.h"
#include "launch.h"
#include "packed_weights.h"

namespace fcm {
namespace {

constexpr int kResourceVersion = 3, kUseTf32 = 10011;

void warn(const ort::KernelInfo* info, const std::string& message) {
  const ort::Logger* logger = nullptr;
  if (ort::succeeded(ort::kernel_logger(info, &logger)) && logger)
    ort::succeeded(ort::log_message(logger, ort::kWarning, message.c_str(), __FILE__, __LINE__, "fcm"));
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
    void* const y = call_output(shape.output_shape, context);
    void* pool = nullptr;
    if (module_.pool) {
      const int rows = launch(spec_, shape.batch, inputs.map.height, inputs.map.width).pool_rows;
      pool = call_output(pool_shape(module_, shape.batch, rows), context, 1);
    }
    if (!shape.batch) return;
    if (!ready_.load(std::memory_order_acquire)) load(context);
    Params params = params_;
    params.x = inputs.x, params.residual = inputs.residual, params.y = y;
    params.scale = inputs.scale, params.pool = pool;
    void* stream = nullptr;
    check(ort::compute_stream(context, &stream));
    launch_module(gpu_, spec_, shape, inputs.map, params, *kernel_, static_cast<cuda::Stream>(stream));
  }

 private:
  // Chooses the tile, uploads the weights, starts the compilation. Returns why the node's tile was replaced, if it was.
  std::string prepare(Type type) {
    Fitted fitted = fit_tile(make_spec(module_, type), module_.tile, gpu_.limits);
    spec_ = fitted.spec;
    compilation_ = start_compilation(kernel_source(spec_), architecture(gpu_));
    const PackedWeights packed(module_, spec_);
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
    kernel_ = load_kernel(*compilation_, gpu_.context, threads(spec_), shared_bytes(spec_));
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
  return std::make_unique<CudaKernel>(staged(std::move(module)), info);
}

}  // namespace fcm
