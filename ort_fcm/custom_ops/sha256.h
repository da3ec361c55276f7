// SHA-256, so that no two kernels can share a name in the cache, and so that a damaged file shows.
#pragma once

#include <string>

namespace fcm {

std::string sha256(const std::string& data);  // 64 hexadecimal digits

}  // namespace fcm
