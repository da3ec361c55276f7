#include "node.h"

#include "kernels/half.h"

namespace fcm {
namespace {

template <class T, class Getter>
std::vector<T> read_array(Getter get) {
  size_t size = 0;
  check(get(nullptr, &size));
  std::vector<T> values(size);
  if (size) check(get(values.data(), &size));
  return values;
}

std::string read_string(const ort::KernelInfo* info, const char* name) {
  const auto chars =
      read_array<char>([&](char* out, size_t* size) { return ort::attribute_string(info, name, out, size); });
  return chars.empty() ? "" : std::string(chars.data());
}

// A list getter also "succeeds" on a list of another type, with no elements: so the one that finds some tells the type.
Attributes read_all(const ort::KernelInfo* info) {
  Attributes attributes;
  for (const auto& [key, type] : attribute_types()) {
    const char* name = key.c_str();
    size_t sizes[4] = {};
    float real = 0;
    int64_t integer = 0;
    const bool found[] = {ort::succeeded(ort::attribute_string(info, name, nullptr, &sizes[0])),
                          ort::succeeded(ort::attribute_ints(info, name, nullptr, &sizes[1])),
                          ort::succeeded(ort::attribute_floats(info, name, nullptr, &sizes[2])),
                          ort::succeeded(ort::attribute_float(info, name, &real))};
    sizes[3] = 1;
    const size_t wanted = type.index();
    bool other = ort::succeeded(ort::attribute_int(info, name, &integer));
    for (size_t i = 0; i < 4; ++i) other = other || (i != wanted && found[i] && sizes[i]);
    if (other) {
      const char* const names[] = {"a string", "a list of integers", "a list of floats", "a float"};
      fail("attribute ", name, " is not ", names[wanted]);
    }
    if (!found[wanted]) continue;
    if (wanted == 0)
      attributes[key] = read_string(info, name);
    else if (wanted == 1)
      attributes[key] =
          read_array<int64_t>([&](int64_t* out, size_t* count) { return ort::attribute_ints(info, name, out, count); });
    else if (wanted == 2)
      attributes[key] =
          read_array<float>([&](float* out, size_t* count) { return ort::attribute_floats(info, name, out, count); });
    else
      attributes[key] = real;
  }
  return attributes;
}

bool has_input(const ort::KernelInfo* info, size_t index) {
  size_t count = 0, size = 0;
  check(ort::input_count(info, &count));
  if (index >= count) return false;
  check(ort::input_name(info, index, nullptr, &size));
  return size > 1;  // with the terminating zero
}

bool has_output(const ort::KernelInfo* info, size_t index) {
  size_t count = 0, size = 0;
  check(ort::output_count(info, &count));
  if (index >= count) return false;
  check(ort::output_name(info, index, nullptr, &size));
  return size > 1;
}

// The value of a constant input, or null.
const ort::Value* constant(const ort::KernelInfo* info, size_t index) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(ort::constant_input(info, index, &is_constant, &value));
  return is_constant ? value : nullptr;
}

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

Tensor read_tensor(const ort::Value* value, bool half, const std::string& name) {
  if (!value) fail("the ", name, " is missing");
  Tensor tensor;
  tensor.shape = tensor_shape(value, half ? ort::kFloat16 : ort::kFloat, name.c_str());
  int64_t count = 1;
  for (int64_t dimension : tensor.shape) count *= dimension;  // of a tensor in memory: cannot overflow
  const void* data = tensor_data(value);
  if (half) {
    const auto* halves = static_cast<const uint16_t*>(data);
    tensor.values.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) tensor.values[size_t(i)] = half_to_float(halves[i]);
  } else {
    const auto* floats = static_cast<const float*>(data);
    tensor.values.assign(floats, floats + count);
  }
  return tensor;
}

std::vector<float> read_vector(const ort::Value* value, bool half, const std::string& name, int length) {
  Tensor tensor = read_tensor(value, half, name);
  if (tensor.shape != std::vector<int64_t>{length})
    fail("the ", name, " has shape ", shape_text(tensor.shape), " instead of [", length, "]");
  return std::move(tensor.values);
}

// Channels, weights, biases and slopes of the stages; `input` gives the tensor of an input.
template <class Input>
void read_weights(Module& module, Input input) {
  int channels = 0;
  for (size_t i = 0; i < module.stages.size(); ++i) {
    const std::string of_stage = text(" of stage ", i + 1);
    Stage& stage = module.stages[i];
    Tensor weight = read_tensor(input(weight_input(i)), module.half, "weight" + of_stage);
    set_channels(stage, int(i) + 1, weight.shape, channels);
    stage.weight = std::move(weight.values);
    channels = stage.out_channels;
    if (stage.has_bias) stage.bias = read_vector(input(bias_input(i)), module.half, "bias" + of_stage, channels);
    if (stage.act.kind == Activation::prelu)
      stage.slope = read_vector(input(slope_input(i)), module.half, "slope" + of_stage, channels);
  }
}

}  // namespace

void check(ort::Status* status) {
  if (!status) return;
  const std::string message = ort::error_message(status);
  ort::release_status(status);
  throw Error(message);
}

std::string node_name(const ort::KernelInfo* info) {
  size_t size = 0;
  if (!ort::succeeded(ort::node_name(info, nullptr, &size)) || !size) return "";
  std::string name(size, '\0');
  if (!ort::succeeded(ort::node_name(info, name.data(), &size))) return "";
  return name.c_str();
}

Module read_node(const ort::KernelInfo* info, bool half, bool constants_only) {
  Module module = read_attributes(node_name(info), read_all(info));
  module.half = half;
  module.residual = has_input(info, kResidualInput);
  module.scaled = has_input(info, kScaleInput);
  module.pool = has_output(info, 1);
  const auto look_at = [&](size_t index, const std::string& name) {
    if (constant(info, index)) return;
    if (constants_only) fail("the ", name, " is not a constant");
    module.varying = true;
  };
  for (size_t i = 0; i < kMaxStages; ++i) {
    const std::string of_stage = text(" of stage ", i + 1);
    if (i >= module.stages.size()) {
      if (has_input(info, weight_input(i)) || has_input(info, bias_input(i)) || has_input(info, slope_input(i)))
        fail("inputs are given for stage ", i + 1, ", but there are only ", module.stages.size(), " stages");
      continue;
    }
    Stage& stage = module.stages[i];
    if (!has_input(info, weight_input(i))) fail("the weight", of_stage, " is missing");
    look_at(weight_input(i), "weight" + of_stage);
    stage.has_bias = has_input(info, bias_input(i));
    if (stage.has_bias) look_at(bias_input(i), "bias" + of_stage);
    const bool prelu = stage.act.kind == Activation::prelu;
    if (prelu != has_input(info, slope_input(i)))
      fail("the slope", of_stage, prelu ? " is missing" : " is given, but its activation is not prelu");
    if (prelu) look_at(slope_input(i), "slope" + of_stage);
  }
  if (!module.varying) read_weights(module, [&](size_t index) { return constant(info, index); });
  check_module(module);
  return module;
}

Module with_weights(Module module, const ort::KernelContext* context) {
  read_weights(module, [&](size_t index) {
    const ort::Value* value = nullptr;
    check(ort::kernel_input(context, index, &value));
    return value;
  });
  module.varying = false;
  return module;
}

std::vector<int64_t> tensor_shape(const ort::Value* value, ort::ElementType type, const char* name) {
  ort::TensorInfo* info = nullptr;
  check(ort::tensor_info(value, &info));
  size_t rank = 0;
  int found = 0;
  bool ok = ort::succeeded(ort::dimension_count(info, &rank)) && ort::succeeded(ort::element_type(info, &found));
  std::vector<int64_t> shape(rank);
  if (rank) ok = ok && ort::succeeded(ort::dimensions(info, shape.data(), rank));
  ort::release_tensor_info(info);
  if (!ok || found != type) fail("the ", name, " is not a tensor of the node's type");
  return shape;
}

const void* tensor_data(const ort::Value* value) {
  void* data = nullptr;
  check(ort::tensor_data(const_cast<ort::Value*>(value), &data));
  return data;
}

CallInputs call_inputs(const Module& module, const ort::KernelContext* context) {
  const ort::ElementType type = module.half ? ort::kFloat16 : ort::kFloat;
  const ort::Value* x = nullptr;
  check(ort::kernel_input(context, 0, &x));
  if (!x) fail("input X is missing");
  const std::vector<int64_t> x_shape = tensor_shape(x, type, "input X");
  CallInputs inputs{call_shape(module, x_shape), {}, tensor_data(x), nullptr, nullptr};
  inputs.map = {x_shape[module.input_nchw ? 2 : 1], x_shape[module.input_nchw ? 3 : 2]};
  if (module.residual) {
    const ort::Value* residual = nullptr;
    check(ort::kernel_input(context, kResidualInput, &residual));
    if (!residual) fail("the residual R is missing");
    const std::vector<int64_t> shape = tensor_shape(residual, type, "residual R");
    if (shape != inputs.shape.output_shape)
      fail("the residual R has shape ", shape_text(shape), ", but Y has ", shape_text(inputs.shape.output_shape));
    inputs.residual = tensor_data(residual);
  }
  if (module.scaled) {
    const ort::Value* scale = nullptr;
    check(ort::kernel_input(context, kScaleInput, &scale));
    if (!scale) fail("the factors G are missing");
    const std::vector<int64_t> shape = tensor_shape(scale, type, "factors G");
    std::vector<int64_t> wanted = x_shape;
    wanted[module.input_nchw ? 2 : 1] = wanted[module.input_nchw ? 3 : 2] = 1;
    if (shape != wanted) fail("the factors G have shape ", shape_text(shape), " instead of ", shape_text(wanted));
    inputs.scale = tensor_data(scale);
  }
  return inputs;
}

void* call_output(const std::vector<int64_t>& shape, ort::KernelContext* context, size_t index) {
  ort::Value* y = nullptr;
  check(ort::kernel_output(context, index, shape.data(), shape.size(), &y));
  void* data = nullptr;
  check(ort::tensor_data(y, &data));
  return data;
}

}  // namespace fcm
