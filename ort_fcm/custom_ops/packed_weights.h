// All weights of a module in one block of memory, and which pointers of Params go where in it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "module.h"

namespace fcm {

class PackedWeights {
 public:
  PackedWeights(const Module& module, const Spec& spec);

  const std::string& block() const { return block_; }

  // The pointers, once the block is at `start`.
  Params params(uintptr_t start) const;

 private:
  template <class T, class Pack>
  void add(T* Params::* field, size_t bytes, Pack pack);
  void add_vector(const Spec& spec, const float* Params::* field, const std::vector<float>& values, bool project);

  std::string block_;
  std::vector<std::function<void(Params&, uintptr_t)>> places_;
};

}  // namespace fcm
