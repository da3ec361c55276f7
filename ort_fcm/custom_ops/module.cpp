#include "module.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>

#include "error.h"

namespace fcm {
namespace {

using Ints = std::vector<int64_t>;
using Floats = std::vector<float>;

constexpr int64_t kMaxWindow = 4096;  // of a kernel, stride, pad or dilation: keeps sums of them far from overflow

constexpr int64_t kMaxDepth = 1 << 20;  // channels, and terms of one output's sum: keeps byte counts within 31 bits

const char* const kLegalStages[] = {"dw",    "pw",      "conv",     "dw-pw",      "pw-dw",   "conv-dw",
                                    "pw-pw", "conv-pw", "pw-dw-pw", "conv-dw-pw", "mean-pw", "mean-pw-pw"};

const std::map<std::string, Activation>& activation_names() {
  static const std::map<std::string, Activation> names = {
      {"none", Activation::none},           {"relu", Activation::relu},   {"clip", Activation::clip},
      {"hardswish", Activation::hardswish}, {"silu", Activation::silu},   {"hardsigmoid", Activation::hardsigmoid},
      {"sigmoid", Activation::sigmoid},     {"gelu", Activation::gelu},   {"gelu_tanh", Activation::gelu_tanh},
      {"leakyrelu", Activation::leakyrelu}, {"prelu", Activation::prelu}, {"tanh", Activation::tanh},
  };
  return names;
}

std::vector<std::string> split(const std::string& list, char separator) {
  std::vector<std::string> parts(1);
  for (char c : list) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

// Reads attributes of one node, naming it in every complaint.
class Reader {
 public:
  explicit Reader(const Attributes& attributes) : attributes_(attributes) {}

  template <class T>
  T get(const std::string& name, const T& otherwise) const {
    const auto found = attributes_.find(name);
    return found == attributes_.end() ? otherwise : std::get<T>(found->second);
  }

  std::string required_text(const std::string& name) const {
    if (!attributes_.count(name)) fail("attribute ", name, " is missing");
    return get<std::string>(name, "");
  }

  // `per_stage` x `stages` integers from `low` to kMaxWindow; `otherwise` if absent, an error if there is no such
  // value.
  Ints windows(const std::string& name, size_t per_stage, size_t stages, int64_t low, int64_t otherwise) const {
    if (otherwise < low && !attributes_.count(name)) fail("attribute ", name, " is missing");
    const Ints values = get<Ints>(name, Ints(per_stage * stages, otherwise));
    if (values.size() != per_stage * stages)
      fail("attribute ", name, " has ", values.size(), " values; ", stages, " stages need ", per_stage * stages);
    for (int64_t value : values)
      if (value < low || value > kMaxWindow)
        fail("attribute ", name, " holds ", value, ", which is not within ", low, " and ", kMaxWindow);
    return values;
  }

  Floats params(const std::string& name, size_t count) const {
    Floats values = get<Floats>(name, Floats(count, 0.0f));
    if (values.size() != count) fail("attribute ", name, " has ", values.size(), " values instead of ", count);
    for (float& value : values) {
      if (std::isnan(value)) fail("attribute ", name, " holds a NaN");
      value = std::clamp(value, -FLT_MAX, FLT_MAX);  // a bound of infinity: generated source has no literal for it
    }
    return values;
  }

  bool is_nchw(const std::string& name) const {
    const std::string layout = get<std::string>(name, "NHWC");
    if (layout != "NHWC" && layout != "NCHW") fail("attribute ", name, " is '", layout, "' instead of NHWC or NCHW");
    return layout == "NCHW";
  }

 private:
  const Attributes& attributes_;
};

Act read_activation(const std::string& name, float alpha, float beta) {
  const auto found = activation_names().find(name);
  if (found == activation_names().end()) fail("activation '", name, "' is unknown");
  return {found->second, alpha, beta};
}

StageKind stage_kind(const std::string& name) {
  return name == "dw" ? StageKind::depthwise : name == "pw" ? StageKind::pointwise : StageKind::convolution;
}

void check_pointwise(const Stage& stage, size_t number) {
  const Window& w = stage.window;
  if (w.kernel_h != 1 || w.kernel_w != 1 || w.pad_top || w.pad_left || w.pad_bottom || w.pad_right)
    fail("stage ", number, " is pw but has a kernel of ", w.kernel_h, "x", w.kernel_w, " or pads");
  if (number > 1 && (w.stride_h != 1 || w.stride_w != 1))
    fail("stage ", number, " is a pw behind another stage and has a stride, which only a first stage may");
}

}  // namespace

const Attributes& attribute_types() {
  static const Attributes types = {
      {"stages", std::string()},
      {"kernel_shape", Ints()},
      {"strides", Ints()},
      {"dilations", Ints()},
      {"pads", Ints()},
      {"activations", std::string()},
      {"activation_params", Floats()},
      {"output_activation", std::string()},
      {"output_activation_params", Floats()},
      {"input_layout", std::string()},
      {"output_layout", std::string()},
      {"norm_epsilon", 0.0f},
      {"tile", std::string()},
      {"gpu", std::string()},
  };
  return types;
}

Module read_attributes(const std::string& node, const Attributes& attributes) {
  const Reader read(attributes);
  Module module;
  module.node = node;
  const std::string stages = read.required_text("stages");
  if (std::find(std::begin(kLegalStages), std::end(kLegalStages), stages) == std::end(kLegalStages))
    fail("attribute stages is '", stages, "', which is no legal chain");
  std::vector<std::string> kinds = split(stages, '-');
  module.mean = kinds[0] == "mean";
  if (module.mean) kinds.erase(kinds.begin());
  const size_t n = kinds.size();
  const Ints kernels = read.windows("kernel_shape", 2, n, 1, 0);
  const Ints strides = read.windows("strides", 2, n, 1, 1);
  const Ints dilations = read.windows("dilations", 2, n, 1, 1);
  const Ints pads = read.windows("pads", 4, n, 0, 0);
  const Floats params = read.params("activation_params", 2 * n);
  const std::string activations = read.get<std::string>("activations", "");
  const std::vector<std::string> names =
      activations.empty() ? std::vector<std::string>(n, "none") : split(activations, ',');
  if (names.size() != n) fail("attribute activations has ", names.size(), " names for ", n, " stages");

  for (size_t i = 0; i < n; ++i) {
    Stage stage;
    stage.kind = stage_kind(kinds[i]);
    Window& w = stage.window;
    w.kernel_h = int(kernels[2 * i]), w.kernel_w = int(kernels[2 * i + 1]);
    w.stride_h = int(strides[2 * i]), w.stride_w = int(strides[2 * i + 1]);
    w.dilation_h = int(dilations[2 * i]), w.dilation_w = int(dilations[2 * i + 1]);
    w.pad_top = int(pads[4 * i]), w.pad_left = int(pads[4 * i + 1]);
    w.pad_bottom = int(pads[4 * i + 2]), w.pad_right = int(pads[4 * i + 3]);
    stage.act = read_activation(names[i], params[2 * i], params[2 * i + 1]);
    if (stage.kind == StageKind::pointwise) check_pointwise(stage, i + 1);
    module.stages.push_back(std::move(stage));
  }
  const Floats output_params = read.params("output_activation_params", 2);
  module.output_act =
      read_activation(read.get<std::string>("output_activation", "none"), output_params[0], output_params[1]);
  if (module.output_act.kind == Activation::prelu) fail("output_activation cannot be prelu");
  module.input_nchw = read.is_nchw("input_layout");
  module.output_nchw = read.is_nchw("output_layout");
  module.norm_epsilon = read.get<float>("norm_epsilon", 0.0f);
  if (!(module.norm_epsilon >= 0 && module.norm_epsilon <= FLT_MAX))
    fail("attribute norm_epsilon is ", module.norm_epsilon, " instead of a positive number, or 0 for none");
  module.tile = read.get<std::string>("tile", "");
  return module;
}

void set_channels(Stage& stage, int number, const std::vector<int64_t>& shape, int previous_channels) {
  const Window& w = stage.window;
  const bool depthwise = stage.kind == StageKind::depthwise;
  if (shape.size() != 4 || shape[2] != w.kernel_h || shape[3] != w.kernel_w || (depthwise && shape[1] != 1))
    fail("the weight of stage ", number, " has shape ", shape_text(shape), " instead of [M, ", depthwise ? "1" : "C",
         ", ", w.kernel_h, ", ", w.kernel_w, "]");
  if (shape[0] < 1 || shape[1] < 1 || shape[0] > kMaxDepth || shape[1] > kMaxDepth ||
      shape[1] * shape[2] * shape[3] > kMaxDepth)
    fail("the weight of stage ", number, " has shape ", shape_text(shape), ", which is empty or too large");
  const int64_t in = depthwise ? shape[0] : shape[1];
  if (previous_channels && in != previous_channels)
    fail("the weight of stage ", number, " takes ", in, " channels, but the stage before makes ", previous_channels);
  stage.in_channels = int(in);
  stage.out_channels = int(shape[0]);
}

void check_module(const Module& module) {
  if (!module.residual && module.output_act.kind != Activation::none)
    fail("output_activation is given without the residual input R");
  if (module.pool && (module.mean || (module.stages.back().kind == StageKind::depthwise && module.residual)))
    fail("there is a second output, which no module has on a mean, or on a depthwise with a residual");
  if (module.scaled && (module.stages.front().kind != StageKind::pointwise || module.mean))
    fail("factors G are given, which only a module takes that starts with a pointwise");
  const bool plain_pointwise = module.stages.front().kind == StageKind::pointwise && !module.mean && !module.scaled;
  if (module.norm_epsilon > 0 && !plain_pointwise)
    fail("norm_epsilon is given, which only a module takes that starts with a pointwise, without a mean or factors");
  if (module.mean && module.residual) fail("a residual is given to a module on a mean");
}

MapSize output_size(const Stage& stage, MapSize in) {
  const Window& w = stage.window;
  return {window_out(in.height, w.kernel_h, w.stride_h, w.dilation_h, w.pad_top, w.pad_bottom),
          window_out(in.width, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left, w.pad_right)};
}

CallShape call_shape(const Module& module, const std::vector<int64_t>& x_shape) {
  const int channel_axis = module.input_nchw ? 1 : 3;
  const int channels = module.stages.front().in_channels;
  if (x_shape.size() != 4 || x_shape[channel_axis] != channels)
    fail("input X has shape ", shape_text(x_shape), ", but ", channels, " channels are needed on axis ", channel_axis,
         " of 4");
  CallShape call;
  call.batch = x_shape[0];
  call.sizes.push_back({x_shape[module.input_nchw ? 2 : 1], x_shape[module.input_nchw ? 3 : 2]});
  const auto limit = [&](int64_t value) {
    if (value < 0 || value > INT_MAX / 2) fail("input X has shape ", shape_text(x_shape), ", which is too large");
  };
  limit(call.batch), limit(call.sizes[0].height), limit(call.sizes[0].width);
  if (module.mean) {
    if (!call.sizes[0].height || !call.sizes[0].width)
      fail("input X has shape ", shape_text(x_shape), ", of which there is no mean");
    call.sizes[0] = {1, 1};
  }
  for (const Stage& stage : module.stages) {
    const MapSize size = output_size(stage, call.sizes.back());
    if (size.height < 1 || size.width < 1)
      fail("input X has shape ", shape_text(x_shape), ", which is smaller than the windows of the module");
    limit(size.height), limit(size.width);
    call.sizes.push_back(size);
  }
  const MapSize out = call.sizes.back();
  const int64_t out_channels = module.stages.back().out_channels;
  call.output_shape = module.output_nchw ? std::vector<int64_t>{call.batch, out_channels, out.height, out.width}
                                         : std::vector<int64_t>{call.batch, out.height, out.width, out_channels};
  return call;
}

std::vector<int64_t> pool_shape(const Module& module, int64_t batch, int64_t rows) {
  return {batch, rows, 1, module.stages.back().out_channels};
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += text(i ? ", " : "", shape[i]);
  return out + "]";
}

}  // namespace fcm
