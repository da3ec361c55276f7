// One sentence that names the node and the cause. Thrown inside the library, a status or a return code at its edge.
#pragma once

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fcm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  out.imbue(std::locale::classic());  // a host program's locale must not reach generated source
  out.precision(9);                   // enough to tell any two floats apart
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(text(parts...));
}

}  // namespace fcm
