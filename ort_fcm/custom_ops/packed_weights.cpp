#include "packed_weights.h"

#include "kernels/pack.h"

namespace fcm {
namespace {

constexpr size_t kAlignment = 256;

}  // namespace

template <class T, class Pack>
void PackedWeights::add(T* Params::* field, size_t bytes, Pack pack) {
  const size_t offset = (block_.size() + kAlignment - 1) / kAlignment * kAlignment;
  block_.resize(offset + bytes);
  pack(block_.data() + offset);
  places_.push_back([=](Params& params, uintptr_t start) { params.*field = reinterpret_cast<T*>(start + offset); });
}

void PackedWeights::add_vector(const Spec& spec, const float* Params::* field, const std::vector<float>& values,
                               bool project) {
  const int length = padded_vector(spec, project);
  add(field, size_t(length) * 4, [&](void* out) {
    pack_vector(values.empty() ? nullptr : values.data(), int(values.size()), length, static_cast<float*>(out));
  });
}

PackedWeights::PackedWeights(const Module& module, const Spec& spec) {
  for (size_t i = 0; i < module.stages.size(); ++i) {
    const Stage& stage = module.stages[i];
    const float* weight = stage.weight.data();
    const bool prelu = stage.act.kind == Activation::prelu;
    if (stage.kind == StageKind::depthwise) {
      add(&Params::depthwise_weight, packed_depthwise_bytes(spec), [&](void* to) { pack_depthwise(spec, weight, to); });
      add_vector(spec, &Params::depthwise_bias, stage.bias, false);
      if (prelu) add_vector(spec, &Params::depthwise_slope, stage.slope, false);
    } else if (i + 1 == module.stages.size()) {
      add(&Params::project_weight, packed_project_bytes(spec), [&](void* to) { pack_project(spec, weight, to); });
      add_vector(spec, &Params::project_bias, stage.bias, true);
      if (prelu) add_vector(spec, &Params::project_slope, stage.slope, true);
    } else {
      add(&Params::first_weight, packed_first_bytes(spec), [&](void* to) { pack_first(spec, weight, to); });
      add_vector(spec, &Params::first_bias, stage.bias, false);
      if (prelu) add_vector(spec, &Params::first_slope, stage.slope, false);
    }
  }
}

Params PackedWeights::params(uintptr_t start) const {
  Params params{};
  for (const auto& place : places_) place(params, start);
  return params;
}

}  // namespace fcm
