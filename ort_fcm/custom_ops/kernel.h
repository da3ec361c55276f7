// A kernel of one node, as the op sees it.
#pragma once

#include <memory>

#include "node.h"

namespace fcm {

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual const std::string& node() const = 0;
  virtual void compute(ort::KernelContext* context) = 0;  // throws Error
};

std::unique_ptr<Kernel> make_cpu_kernel(Module module);

// `info` is used during the call alone, for ONNX Runtime's logger.
std::unique_ptr<Kernel> make_cuda_kernel(Module module, const ort::KernelInfo* info);

}  // namespace fcm
