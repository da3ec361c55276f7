// The shape of Y from that of X, when a session is made.
#pragma once

#include "ort_abi.h"

namespace fcm {

// What it cannot tell it leaves unset. A wrong node is not its concern: making the kernel refuses that, and ONNX
// Runtime ignores what inference reports.
ort::Status* infer_shape(ort::ShapeContext* context);

}  // namespace fcm
