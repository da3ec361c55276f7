// Registration of FusedConvModule with ONNX Runtime: on the CPU and the CUDA provider, for float and float16.
#include <cstdlib>
#include <cstring>

#include "kernel.h"

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
  Module module = read_node(info, op.type == ort::kFloat16);
  if (!std::strcmp(op.provider, "CPUExecutionProvider")) return make_cpu_kernel(std::move(module));
  return make_cuda_kernel(std::move(module), info);
}

ort::Status* create_kernel(const ort::CustomOp* op, const void*, const ort::KernelInfo* info, void** kernel) {
  *kernel = nullptr;
  return guarded(node_name(info), [&] { *kernel = make_kernel(as_op(op), info).release(); });
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  Kernel& self = *static_cast<Kernel*>(kernel);
  return guarded(self.node(), [&] { self.compute(context); });
}

template <class T>
std::vector<T> read_array(const ort::ShapeContext* context, const char* name, ort::AttributeType type) {
  const ort::OpAttribute* attribute = nullptr;
  size_t bytes = 0;
  if (!ort::succeeded(ort::shape_attribute(context, name, &attribute)) || !attribute) return {};
  ort::succeeded(ort::read_attribute(attribute, type, nullptr, 0, &bytes));  // fails, but tells the size
  std::vector<T> values(bytes / sizeof(T));
  if (!values.empty()) check(ort::read_attribute(attribute, type, values.data(), bytes, &bytes));
  return values;
}

Attributes read_all(const ort::ShapeContext* context) {
  Attributes attributes;
  for (const auto& [name, type] : attribute_types()) {
    if (type.index() == 0) {
      const auto chars = read_array<char>(context, name.c_str(), ort::kString);
      if (!chars.empty()) attributes[name] = std::string(chars.begin(), chars.end()).c_str();
    } else if (type.index() == 1) {
      auto ints = read_array<int64_t>(context, name.c_str(), ort::kInts);
      if (!ints.empty()) attributes[name] = std::move(ints);
    }  // the shape does not depend on floats
  }
  return attributes;
}

struct Shape {
  int type;
  std::vector<int64_t> dimensions;  // -1: unknown
  std::vector<const char*> names;
};

bool input_shape(const ort::ShapeContext* context, size_t index, Shape& shape) {
  size_t count = 0, rank = 0;
  ort::TensorInfo* info = nullptr;  // owned by the context
  check(ort::shape_input_count(context, &count));
  if (index >= count || !ort::succeeded(ort::shape_input(context, index, &info)) || !info) return false;
  check(ort::element_type(info, &shape.type));
  check(ort::dimension_count(info, &rank));
  if (rank != 4) return false;  // an unknown rank shows as 0
  shape.dimensions.resize(rank), shape.names.resize(rank);
  check(ort::dimensions(info, shape.dimensions.data(), rank));
  check(ort::symbolic_dimensions(info, shape.names.data(), rank));
  return true;
}

void set_output(ort::ShapeContext* context, Shape& shape) {
  ort::TensorInfo* info = nullptr;
  check(ort::create_tensor_info(&info));
  const bool ok = ort::succeeded(ort::set_element_type(info, shape.type)) &&
                  ort::succeeded(ort::set_dimensions(info, shape.dimensions.data(), shape.dimensions.size())) &&
                  ort::succeeded(ort::set_symbolic_dimensions(info, shape.names.data(), shape.names.size())) &&
                  ort::succeeded(ort::set_output_shape(context, 0, info));
  ort::release_tensor_info(info);
  if (!ok) fail("the shape of Y cannot be set");
}

// A wrong node is left to create_kernel to refuse: ONNX Runtime ignores what inference reports.
// ONNX Runtime may call it on the registration of another type, so X tells the type.
ort::Status* infer_shape(const ort::CustomOp*, ort::ShapeContext* context) {
  return guarded("", [&] {
    const Module module = read_attributes("", read_all(context));
    Shape x, weight;
    if (!input_shape(context, 0, x) || !input_shape(context, weight_input(module.stages.size() - 1), weight)) return;
    const int in_h = module.input_nchw ? 2 : 1, out_h = module.output_nchw ? 2 : 1;
    Shape y{x.type, {x.dimensions[0], -1, -1, -1}, {x.names[0], "", "", ""}};
    y.dimensions[module.output_nchw ? 1 : 3] = weight.dimensions[0];
    MapSize size{x.dimensions[in_h], x.dimensions[in_h + 1]};
    for (const Stage& stage : module.stages) {
      const MapSize next = output_size(stage, size);
      size = {size.height < 0 ? -1 : next.height, size.width < 0 ? -1 : next.width};
    }
    y.dimensions[out_h] = size.height, y.dimensions[out_h + 1] = size.width;
    set_output(context, y);
  });
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
  op.output_count = [](const ort::CustomOp*) { return size_t{1}; };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i < 2 ? ort::kRequired : ort::kOptional; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.input_memory_type = [](const ort::CustomOp*, size_t i) {
    return i == 0 || i == kResidualInput ? ort::kDefault : ort::kCpuInput;
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
  op.infer_output_shape = infer_shape;
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
