#include "cubin_cache.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "error.h"
#include "nvrtc.h"
#include "sha256.h"

namespace fcm {
namespace {

constexpr size_t kChecksum = 64;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// The content of the file without its checksum; empty if there is no such file, or if it is damaged.
std::string load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (content.size() <= kChecksum) return "";
  const std::string checksum = content.substr(content.size() - kChecksum);
  content.resize(content.size() - kChecksum);
  return sha256(content) == checksum ? content : "";
}

void store(const std::string& path, const std::string& content) {
  std::error_code ignored;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ignored);
  std::string temporary = path + ".XXXXXX";
  const int descriptor = mkstemp(temporary.data());
  if (descriptor < 0) return;
  const std::string whole = content + sha256(content);
  size_t written = 0;
  while (written < whole.size()) {
    const ssize_t count = write(descriptor, whole.data() + written, whole.size() - written);
    if (count <= 0) break;
    written += size_t(count);
  }
  close(descriptor);
  if (written == whole.size())
    std::filesystem::rename(temporary, path, ignored);
  else
    ignored = std::make_error_code(std::errc::io_error);
  if (ignored) unlink(temporary.c_str());
}

}  // namespace

std::string cache_directory() {
  if (const std::string chosen = variable("ORT_FCM_CACHE"); !chosen.empty()) return chosen;
  if (const std::string caches = variable("XDG_CACHE_HOME"); !caches.empty()) return caches + "/ort_fcm";
  const std::string home = variable("HOME");
  return home.empty() ? "" : home + "/.cache/ort_fcm";
}

std::string cache_path(const std::string& key) { return cache_directory() + "/" + key + ".cubin"; }

std::string cubin_key(const std::string& source, const std::string& architecture) {
  return sha256(compiler_identity(architecture) + source);
}

std::string cached_cubin(const std::string& key, const std::string& source, const std::string& architecture) {
  const bool cached = !cache_directory().empty();
  std::string cubin = cached ? load(cache_path(key)) : "";
  if (!cubin.empty()) return cubin;
  cubin = compile_cubin(source, architecture);
  if (cached) store(cache_path(key), cubin);
  return cubin;
}

}  // namespace fcm
