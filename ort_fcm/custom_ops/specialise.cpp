#include "specialise.h"

#include "error.h"

namespace fcm {
namespace {

void set_first(Spec& spec, const Stage& stage) {
  spec.first = stage.kind == StageKind::convolution ? Dense::convolution : Dense::pointwise;
  spec.first_window = stage.window;
  spec.first_act = stage.act;
}

void set_depthwise(Spec& spec, const Stage& stage) {
  spec.depthwise = true;
  spec.depthwise_window = stage.window;
  spec.depthwise_act = stage.act;
}

void set_project(Spec& spec, const Stage& stage) {
  spec.project = stage.kind == StageKind::convolution ? Dense::convolution : Dense::pointwise;
  spec.project_window = stage.window;
  spec.project_act = stage.act;
}

}  // namespace

Module staged(Module module) {
  const Stage& stem = module.stages.front();
  if (module.stages.size() > 1 || stem.kind != StageKind::convolution || stem.in_channels > kStemChannels)
    return module;
  if (module.pool && module.residual) return module;  // a depthwise at the end writes sums without a residual
  Stage passing;
  passing.kind = StageKind::depthwise;
  passing.in_channels = passing.out_channels = stem.out_channels;
  passing.weight.assign(size_t(stem.out_channels), 1.f);
  module.stages.push_back(std::move(passing));
  module.passes = !module.residual && !module.pool;
  return module;
}

Spec make_spec(const Module& module, Type type) {
  Spec spec;
  spec.type = type;
  const std::vector<Stage>& stages = module.stages;
  spec.c_in = stages.front().in_channels;
  spec.c_out = stages.back().out_channels;
  spec.c_mid = stages.size() > 1 ? stages.front().out_channels : stages.front().in_channels;
  for (size_t i = 0; i < stages.size(); ++i) {
    if (stages[i].kind == StageKind::depthwise)
      set_depthwise(spec, stages[i]);
    else if (i + 1 == stages.size())
      set_project(spec, stages[i]);
    else
      set_first(spec, stages[i]);
  }
  spec.mean = module.mean, spec.pool = module.pool, spec.scaled = module.scaled;
  spec.norm_epsilon = module.norm_epsilon;
  spec.passes = module.passes;
  spec.residual = module.residual;
  spec.output_act = module.output_act;
  spec.input_nchw = module.input_nchw;
  spec.output_nchw = module.output_nchw;
  return spec;
}

}  // namespace fcm
