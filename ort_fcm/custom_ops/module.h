// What a FusedConvModule node says, checked and in plain data: no ONNX Runtime, no CUDA.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "kernels/spec.h"

namespace fcm {

constexpr int kMaxStages = 3;

enum class StageKind { depthwise, pointwise, convolution };

struct Stage {
  StageKind kind = StageKind::pointwise;
  Window window;
  Act act;
  bool has_bias = false;
  int in_channels = 0, out_channels = 0;
  std::vector<float> weight;  // [M, C/group, kH, kW]
  std::vector<float> bias;    // [M], or empty
  std::vector<float> slope;   // [M] with PRelu, else empty
};

struct Module {
  std::string node;  // its name, for messages
  bool half = false;
  std::vector<Stage> stages;
  bool mean = false;  // the stages run on the mean of X over its map
  bool residual = false;
  bool pool = false;       // there is a second output, of sums of Y
  bool scaled = false;     // there are factors of X
  float norm_epsilon = 0;  // above 0: X is normalised over its channels
  bool passes = false;     // the last stage is a depthwise that hands its input on (`staged`)
  bool varying = false;    // weights, biases or slopes are not constant: each call brings its own
  Act output_act;
  bool input_nchw = false, output_nchw = false;
  std::string tile;
};

// A node's attributes as found: those that are absent have no entry.
using Attribute = std::variant<std::string, std::vector<int64_t>, std::vector<float>, float>;
using Attributes = std::map<std::string, Attribute>;

// The names and types of all attributes of the op: the default-constructed alternative tells the type.
const Attributes& attribute_types();

// Everything the attributes say; channels, weights and `residual` are left for the caller. Throws Error.
Module read_attributes(const std::string& node, const Attributes& attributes);

// Sets `stage`'s channels from the shape of its weight, given those of the stage before (0: none). Throws Error.
void set_channels(Stage& stage, int number, const std::vector<int64_t>& weight_shape, int previous_channels);

// What holds between the parts of a module that is read whole. Throws Error.
void check_module(const Module& module);

// Height and width after `stage` for an input of `height` x `width` pixels.
struct MapSize {
  int64_t height, width;
};
MapSize output_size(const Stage& stage, MapSize input);

// Shapes of a call, all in 64 bits. Throws Error if X does not fit the module.
struct CallShape {
  int64_t batch;
  std::vector<MapSize> sizes;         // of X (with `mean`, of the mean) and after each stage
  std::vector<int64_t> output_shape;  // of Y, and of R
};
CallShape call_shape(const Module& module, const std::vector<int64_t>& x_shape);

// The shape of the second output, sums of Y, where they have so many rows.
std::vector<int64_t> pool_shape(const Module& module, int64_t batch, int64_t rows);

std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace fcm
