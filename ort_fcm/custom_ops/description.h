// A module as text, for tools and tests that have no node of ONNX Runtime.
#pragma once

#include <string>

#include "module.h"

namespace fcm {

struct Description {
  Module module;  // without weights
  Type type;
};

// `text` has a line name=value for each attribute of the op (lists separated by spaces), and `channels` (of X, then
// after each stage), `type` (float16, tf32 or float32) and, if need be, `residual` (1). Throws Error.
Description read_description(const std::string& text);

}  // namespace fcm
