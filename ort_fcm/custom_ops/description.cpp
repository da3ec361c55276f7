#include "description.h"

#include <limits>
#include <sstream>

#include "error.h"

namespace fcm {
namespace {

template <class T>
std::vector<T> numbers(const std::string& name, const std::string& list) {
  std::istringstream words(list);
  std::vector<T> out;
  for (std::string word; words >> word;) {
    std::istringstream digits(word);
    digits.imbue(std::locale::classic());
    T number{};
    if (word == "inf" || word == "-inf")
      number = (word[0] == '-' ? -1 : 1) * std::numeric_limits<T>::infinity();  // 0 for integers, which have none
    else if (!(digits >> number) || !digits.eof())
      fail(name, " is not a list of numbers: '", list, "'");
    out.push_back(number);
  }
  return out;
}

Attribute read_attribute(const std::string& name, const Attribute& type, const std::string& value) {
  if (type.index() == 0) return value;
  if (type.index() == 1) return numbers<int64_t>(name, value);
  const std::vector<float> values = numbers<float>(name, value);
  if (type.index() == 2) return values;
  if (values.size() != 1) fail(name, " is not a number: '", value, "'");
  return values[0];
}

Type read_type(const std::string& name) {
  if (name == "float16") return Type::float16;
  if (name == "tf32") return Type::tf32;
  if (name == "float32") return Type::float32;
  fail("type is '", name, "' instead of float16, tf32 or float32");
}

}  // namespace

Description read_description(const std::string& text) {
  Attributes attributes;
  std::map<std::string, std::string> others = {
      {"channels", ""}, {"type", ""}, {"residual", "0"}, {"pool", "0"}, {"scaled", "0"}};
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    const size_t equals = line.find('=');
    const std::string name = line.substr(0, equals), value = equals == line.npos ? "" : line.substr(equals + 1);
    if (const auto known = attribute_types().find(name); known != attribute_types().end())
      attributes[name] = read_attribute(name, known->second, value);
    else if (others.count(name))
      others[name] = value;
    else
      fail("a module has no '", name, "'");
  }
  Description out{read_attributes("", attributes), read_type(others["type"])};
  Module& module = out.module;
  const std::vector<int64_t> channels = numbers<int64_t>("channels", others["channels"]);
  if (channels.size() != module.stages.size() + 1)
    fail("channels has ", channels.size(), " values; ", module.stages.size(), " stages need one more than they are");
  module.half = out.type == Type::float16;
  module.residual = others["residual"] == "1";
  module.pool = others["pool"] == "1", module.scaled = others["scaled"] == "1";
  for (size_t i = 0; i < module.stages.size(); ++i) {
    Stage& stage = module.stages[i];
    const bool depthwise = stage.kind == StageKind::depthwise;
    const Window& w = stage.window;
    set_channels(stage, int(i) + 1, {channels[i + 1], depthwise ? 1 : channels[i], w.kernel_h, w.kernel_w},
                 int(channels[i]));
  }
  check_module(module);
  return out;
}

}  // namespace fcm
