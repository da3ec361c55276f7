#include "nvrtc.h"

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

#include "error.h"
#include "sources.h"

namespace fcm {
namespace {

using Program = void*;

struct Nvrtc {
  std::string path;
  int major = 0, minor = 0;
  int (*version)(int*, int*);
  const char* (*error_string)(int);
  int (*create)(Program*, const char* source, const char* name, int headers, const char* const* contents,
                const char* const* names);
  int (*compile)(Program, int options, const char* const*);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);
  int (*destroy)(Program*);
};

template <class Function>
void bind(void* library, Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) fail("NVRTC lacks ", name);
}

// Where pip puts nvidia-cuda-nvrtc, seen from the directory site-packages/ort_fcm of this library.
std::string site_packages() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&site_packages), &info) || !info.dli_fname) return "";
  const std::string file = info.dli_fname, directory = file.substr(0, file.find_last_of('/') + 1);
  return (directory.empty() ? "./" : directory) + "../";
}

std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  if (const char* path = std::getenv("ORT_FCM_NVRTC")) paths.push_back(path);
  const std::string nvidia = site_packages() + "nvidia/";
  paths.insert(paths.end(), {nvidia + "cu13/lib/libnvrtc.so.13", nvidia + "cuda_nvrtc/lib/libnvrtc.so.12",
                             "libnvrtc.so.13", "libnvrtc.so.12"});
  return paths;
}

Nvrtc open_nvrtc() {
  void* library = nullptr;
  Nvrtc nvrtc{};
  for (const std::string& path : candidates()) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    nvrtc.path = path;
    if (library) break;
  }
  if (!library) fail("NVRTC is not found; install nvidia-cuda-nvrtc, or set ORT_FCM_NVRTC to the path of libnvrtc.so");
  bind(library, nvrtc.version, "nvrtcVersion");
  bind(library, nvrtc.error_string, "nvrtcGetErrorString");
  bind(library, nvrtc.create, "nvrtcCreateProgram");
  bind(library, nvrtc.compile, "nvrtcCompileProgram");
  bind(library, nvrtc.log_size, "nvrtcGetProgramLogSize");
  bind(library, nvrtc.log, "nvrtcGetProgramLog");
  bind(library, nvrtc.cubin_size, "nvrtcGetCUBINSize");
  bind(library, nvrtc.cubin, "nvrtcGetCUBIN");
  bind(library, nvrtc.destroy, "nvrtcDestroyProgram");
  if (nvrtc.version(&nvrtc.major, &nvrtc.minor)) fail(nvrtc.path, " does not tell its version");
  return nvrtc;
}

const Nvrtc& nvrtc() {
  static const Nvrtc opened = open_nvrtc();
  return opened;
}

std::vector<std::string> options(const std::string& architecture) {
  return {"--std=c++17", "-default-device", "--gpu-architecture=" + architecture};
}

std::string read_log(Program program) {
  size_t size = 0;
  if (nvrtc().log_size(program, &size) || !size) return "";
  std::string log(size, '\0');
  return nvrtc().log(program, log.data()) ? "" : log.c_str();
}

}  // namespace

std::string compile_cubin(const std::string& source, const std::string& architecture) {
  const Nvrtc& compiler = nvrtc();
  std::vector<const char*> contents, names, flags;
  for (const Source& header : sources()) contents.push_back(header.content), names.push_back(header.name);
  const std::vector<std::string> all_options = options(architecture);
  for (const std::string& option : all_options) flags.push_back(option.c_str());

  Program program = nullptr;
  const auto require = [&](int error, const char* what) {
    if (!error) return;
    const std::string log = program ? read_log(program) : "";
    if (program) compiler.destroy(&program);
    fail("NVRTC ", compiler.major, ".", compiler.minor, " cannot ", what, " the kernel for ", architecture, ": ",
         compiler.error_string(error), log.empty() ? "" : "\n", log);
  };
  require(compiler.create(&program, source.c_str(), "fcm_module.cu", int(names.size()), contents.data(), names.data()),
          "read");
  require(compiler.compile(program, int(flags.size()), flags.data()), "compile");
  size_t size = 0;
  require(compiler.cubin_size(program, &size), "assemble");
  std::string cubin(size, '\0');
  require(compiler.cubin(program, cubin.data()), "assemble");
  compiler.destroy(&program);
  return cubin;
}

std::string compiler_identity(const std::string& architecture) {
  std::string identity = text("NVRTC ", nvrtc().major, ".", nvrtc().minor, "\n");
  for (const std::string& option : options(architecture)) identity += option + "\n";
  for (const Source& header : sources()) {
    const std::string content = header.content;
    identity += text(header.name, " ", content.size(), "\n", content);
  }
  return identity;
}

std::string describe_compiler() { return text(nvrtc().path, ", version ", nvrtc().major, ".", nvrtc().minor); }

}  // namespace fcm
