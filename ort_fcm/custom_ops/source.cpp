// The source of one kernel: an include and a function that fills the Spec field by field.
#include "error.h"
#include "specialise.h"

namespace fcm {
namespace {

std::string literal(float value) {
  std::string out = text(value);
  if (out.find_first_of(".e") == std::string::npos) out += ".0";
  return out + "f";
}

std::string literal(Type type) {
  return type == Type::float16 ? "fcm::Type::float16" : type == Type::tf32 ? "fcm::Type::tf32" : "fcm::Type::float32";
}

std::string literal(Dense dense) {
  return dense == Dense::none        ? "fcm::Dense::none"
         : dense == Dense::pointwise ? "fcm::Dense::pointwise"
                                     : "fcm::Dense::convolution";
}

std::string literal(const Act& act) {
  const char* const names[] = {"none",    "relu", "clip",      "hardswish", "silu",  "hardsigmoid",
                               "sigmoid", "gelu", "gelu_tanh", "leakyrelu", "prelu", "tanh"};
  return text("{fcm::Activation::", names[int(act.kind)], ", ", literal(act.alpha), ", ", literal(act.beta), "}");
}

std::string literal(const Window& w) {
  return text("{", w.kernel_h, ", ", w.kernel_w, ", ", w.stride_h, ", ", w.stride_w, ", ", w.dilation_h, ", ",
              w.dilation_w, ", ", w.pad_top, ", ", w.pad_left, ", ", w.pad_bottom, ", ", w.pad_right, "}");
}

std::string literal(bool value) { return value ? "true" : "false"; }
std::string literal(int value) { return std::to_string(value); }

}  // namespace

std::string kernel_source(const Spec& s) {
  std::string out = "#include \"module.cuh\"\n\nconstexpr fcm::Spec make_spec() {\n  fcm::Spec s;\n";
  const auto set = [&](const char* name, const auto& value) {
    out += text("  s.", name, " = ", literal(value), ";\n");
  };
  set("type", s.type);
  set("first", s.first), set("depthwise", s.depthwise), set("project", s.project);
  set("c_in", s.c_in), set("c_mid", s.c_mid), set("c_out", s.c_out);
  set("first_window", s.first_window), set("depthwise_window", s.depthwise_window);
  set("project_window", s.project_window);
  set("first_act", s.first_act), set("depthwise_act", s.depthwise_act), set("project_act", s.project_act);
  set("residual", s.residual), set("output_act", s.output_act);
  set("input_nchw", s.input_nchw), set("output_nchw", s.output_nchw);
  set("mean", s.mean), set("pool", s.pool), set("scaled", s.scaled);
  set("norm_epsilon", s.norm_epsilon), set("passes", s.passes);
  const Tile& t = s.tile;
  set("tile.tile_h", t.tile_h), set("tile.tile_w", t.tile_w), set("tile.images", t.images);
  set("tile.patch_h", t.patch_h), set("tile.chunk", t.chunk);
  set("tile.warps_m", t.warps_m), set("tile.warps_n", t.warps_n), set("tile.block_n", t.block_n);
  set("tile.split", t.split), set("tile.blocks", t.blocks);
  set("tile.resident", t.resident), set("tile.wgmma", t.wgmma);
  return out + "  return s;\n}\n\nFCM_MODULE(make_spec)\n";
}

}  // namespace fcm
