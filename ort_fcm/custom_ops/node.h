// From a node of ONNX Runtime to a Module, and from an Error to a status.
#pragma once

#include "error.h"
#include "module.h"
#include "ort_abi.h"

namespace fcm {

constexpr size_t kInputs = 12, kOutputs = 2;
constexpr size_t kResidualInput = 7, kScaleInput = 11;
constexpr size_t weight_input(size_t stage) { return 1 + 2 * stage; }
constexpr size_t bias_input(size_t stage) { return 2 + 2 * stage; }
constexpr size_t slope_input(size_t stage) { return 8 + stage; }

// Throws the message of a failed `status`, after releasing it.
void check(ort::Status* status);

// Reads and checks the whole node; its weights are copied, if they are constant. Otherwise the module is `varying`, or,
// with `constants_only`, refused. Throws Error.
Module read_node(const ort::KernelInfo* info, bool half, bool constants_only);

// A varying module with the weights of this call. Throws Error.
Module with_weights(Module module, const ort::KernelContext* context);

std::string node_name(const ort::KernelInfo* info);

// The shape of a tensor whose elements are of `type`; throws Error if they are not.
std::vector<int64_t> tensor_shape(const ort::Value* value, ort::ElementType type, const char* name);

const void* tensor_data(const ort::Value* value);

// Input X and, if the module has them, R and G of a call; and the shapes they imply. Throws Error.
struct CallInputs {
  CallShape shape;
  MapSize map;  // of X
  const void* x;
  const void* residual;
  const void* scale;
};
CallInputs call_inputs(const Module& module, const ort::KernelContext* context);

void* call_output(const std::vector<int64_t>& shape, ort::KernelContext* context, size_t index = 0);

// Runs `work`; what it throws becomes a status that names `node`.
template <class Work>
ort::Status* guarded(const std::string& node, Work&& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return ort::create_status(ort::kErrorFail, ("FusedConvModule '" + node + "': " + error.what()).c_str());
  }
}

}  // namespace fcm
