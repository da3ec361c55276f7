// The kernels' own source files, put into the library when it is built.
#pragma once

#include <vector>

namespace fcm {

struct Source {
  const char* name;
  const char* content;
};

const std::vector<Source>& sources();

}  // namespace fcm
