#include "shape_inference.h"

#include <array>

#include "node.h"

namespace fcm {
namespace {

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

struct Dimension {
  int64_t value = -1;  // if `name` is empty; -1: unknown
  std::string name;

  bool known() const { return value >= 0 || !name.empty(); }
};

struct Shape {
  int type = 0;
  std::array<Dimension, 4> dimensions;
};

bool input_shape(const ort::ShapeContext* context, size_t index, Shape& shape) {
  size_t count = 0, rank = 0;
  ort::TensorInfo* info = nullptr;  // owned by the context
  check(ort::shape_input_count(context, &count));
  if (index >= count || !ort::succeeded(ort::shape_input(context, index, &info)) || !info) return false;
  check(ort::element_type(info, &shape.type));
  check(ort::dimension_count(info, &rank));
  if (rank != 4) return false;  // an unknown rank shows as 0
  int64_t values[4];
  const char* names[4];
  check(ort::dimensions(info, values, rank));
  check(ort::symbolic_dimensions(info, names, rank));
  for (size_t i = 0; i < rank; ++i) shape.dimensions[i] = {values[i], names[i] ? names[i] : ""};
  return true;
}

// A size that is known by name alone gets a name that says how it follows from it, so that equal names mean equal
// sizes.
Dimension after_window(const Dimension& in, int64_t out, int kernel, int stride, int dilation, int pads) {
  if (in.name.empty()) return {in.value < 0 ? -1 : out, ""};
  const int rest = pads - dilation * (kernel - 1) - (stride > 1 ? 1 : 0);
  std::string name = in.name;
  if (rest) name = text("(", name, rest > 0 ? "+" : "", rest, ")");
  return {-1, stride > 1 ? text("(", name, "/", stride, "+1)") : name};
}

void set_output(ort::ShapeContext* context, const Shape& shape) {
  int64_t values[4];
  const char* names[4];
  for (size_t i = 0; i < 4; ++i) {
    // There is no way to set a dimension to unknown: -1 would be taken for a size, equal to any other -1.
    if (!shape.dimensions[i].known()) return;
    values[i] = shape.dimensions[i].value;
    names[i] = shape.dimensions[i].name.c_str();
  }
  ort::TensorInfo* info = nullptr;
  check(ort::create_tensor_info(&info));
  const bool ok = ort::succeeded(ort::set_element_type(info, shape.type)) &&
                  ort::succeeded(ort::set_dimensions(info, values, 4)) &&
                  ort::succeeded(ort::set_symbolic_dimensions(info, names, 4)) &&
                  ort::succeeded(ort::set_output_shape(context, 0, info));
  ort::release_tensor_info(info);
  if (!ok) fail("the shape of Y cannot be set");
}

}  // namespace

ort::Status* infer_shape(ort::ShapeContext* context) {
  return guarded("", [&] {
    const Module module = read_attributes("", read_all(context));
    Shape x, weight;
    if (!input_shape(context, 0, x) || !input_shape(context, weight_input(module.stages.size() - 1), weight)) return;
    Dimension height = x.dimensions[module.input_nchw ? 2 : 1], width = x.dimensions[module.input_nchw ? 3 : 2];
    if (module.mean) height = width = {1, ""};
    for (const Stage& stage : module.stages) {
      const Window& w = stage.window;
      const MapSize out = output_size(stage, {height.value, width.value});
      height = after_window(height, out.height, w.kernel_h, w.stride_h, w.dilation_h, w.pad_top + w.pad_bottom);
      width = after_window(width, out.width, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left + w.pad_right);
    }
    const Dimension& channels = weight.dimensions[0];
    // X tells the type: ONNX Runtime may ask this of the registration of another one.
    Shape y{x.type, {x.dimensions[0], height, width, channels}};
    if (module.output_nchw) y.dimensions = {x.dimensions[0], channels, height, width};
    set_output(context, y);
  });
}

}  // namespace fcm
