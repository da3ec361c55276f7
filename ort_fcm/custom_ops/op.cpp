// Registration of FusedConvModule with ONNX Runtime: on the CPU and the CUDA provider, for float and float16.
#include <cstdlib>
#include <cstring>

#include "kernel.h"
#include "shape_inference.h"

namespace fcm {
namespace {

constexpr const char* kDomain = "ort_fcm";
constexpr int kOldestMinor = 27;  // of ONNX Runtime 1: older ones crash on, or misread, what the rewriter emits

struct Op : ort::CustomOp {
  const char* provider;
  ort::ElementType type;
};

const Op& as_op(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

std::unique_ptr<Kernel> make_kernel(const Op& op, const ort::KernelInfo* info) {
  const bool cpu = !std::strcmp(op.provider, "CPUExecutionProvider");
  // On the CPU, ONNX Runtime puts Casts around float16 nodes, and between a constant and its node.
  Module module = read_node(info, op.type == ort::kFloat16, !cpu);
  return cpu ? make_cpu_kernel(std::move(module)) : make_cuda_kernel(std::move(module), info);
}

ort::Status* create_kernel(const ort::CustomOp* op, const void*, const ort::KernelInfo* info, void** kernel) {
  *kernel = nullptr;
  return guarded(node_name(info), [&] { *kernel = make_kernel(as_op(op), info).release(); });
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  Kernel& self = *static_cast<Kernel*>(kernel);
  return guarded(self.node(), [&] { self.compute(context); });
}

Op make_op(const char* provider, ort::ElementType type) {
  Op op{};
  op.provider = provider;
  op.type = type;
  op.version = ort::kApiVersion;
  op.name = [](const ort::CustomOp*) { return "FusedConvModule"; };
  op.execution_provider = [](const ort::CustomOp* self) { return as_op(self).provider; };
  op.input_type = [](const ort::CustomOp* self, size_t) { return as_op(self).type; };
  op.input_count = [](const ort::CustomOp*) { return kInputs; };
  op.output_type = op.input_type;
  op.output_count = [](const ort::CustomOp*) { return kOutputs; };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i < 2 ? ort::kRequired : ort::kOptional; };
  op.output_characteristic = [](const ort::CustomOp*, size_t i) { return i ? ort::kOptional : ort::kRequired; };
  op.input_memory_type = [](const ort::CustomOp*, size_t i) {
    return i == 0 || i == kResidualInput || i == kScaleInput ? ort::kDefault : ort::kCpuInput;
  };
  op.variadic_input_min_arity = [](const ort::CustomOp*) { return 1; };
  op.variadic_output_min_arity = op.variadic_input_min_arity;
  op.variadic_input_homogeneity = op.variadic_input_min_arity;
  op.variadic_output_homogeneity = op.variadic_input_min_arity;
  op.start_version = op.variadic_input_min_arity;
  op.end_version = [](const ort::CustomOp*) { return 0x7fffffff; };
  op.create_kernel_v2 = create_kernel;
  op.kernel_compute_v2 = compute;
  op.kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.infer_output_shape = [](const ort::CustomOp*, ort::ShapeContext* context) { return infer_shape(context); };
  return op;
}

// Made once: sessions keep pointers to it.
ort::CustomOpDomain* domain() {
  static const Op ops[] = {
      make_op("CPUExecutionProvider", ort::kFloat),
      make_op("CPUExecutionProvider", ort::kFloat16),
      make_op("CUDAExecutionProvider", ort::kFloat),
      make_op("CUDAExecutionProvider", ort::kFloat16),
  };
  static ort::CustomOpDomain* const made = [] {
    ort::CustomOpDomain* created = nullptr;
    check(ort::create_domain(kDomain, &created));
    for (const Op& op : ops) check(ort::domain_add(created, &op));
    return created;
  }();
  return made;
}

bool is_too_old(const char* version) {
  char* end = nullptr;
  const long major = std::strtol(version, &end, 10);
  return major < 1 || (major == 1 && std::strtol(end + (*end == '.'), nullptr, 10) < kOldestMinor);
}

}  // namespace
}  // namespace fcm

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  ort::api_table = base->get_api(1);  // every runtime knows number 1 and has but one table
  const char* version = base->version_string();
  try {
    if (fcm::is_too_old(version))
      fcm::fail("ort_fcm needs ONNX Runtime 1.", fcm::kOldestMinor, " or later; this is ", version);
    fcm::check(ort::add_domain(options, fcm::domain()));
    return nullptr;
  } catch (const std::exception& error) {
    return ort::create_status(ort::kErrorFail, error.what());
  }
}
