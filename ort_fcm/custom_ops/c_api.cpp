// C functions for tools and tests: what the library would do for a module, without ONNX Runtime or a GPU. Each returns
// 0 and sets `result`, or returns 1 and sets it to what is wrong; the text lives until the thread's next call.
#include "cubin_cache.h"
#include "description.h"
#include "error.h"
#include "nvrtc.h"
#include "specialise.h"

namespace {

constexpr fcm::Limits kUnlimited{1 << 30, true};

template <class Work>
int answer(const char** result, Work work) noexcept {
  static thread_local std::string text;
  int failed = 0;
  try {
    text = work();
  } catch (const std::exception& error) {
    text = error.what();
    failed = 1;
  }
  *result = text.c_str();
  return failed;
}

fcm::Fitted fit(const char* module, const fcm::Limits& limits) {
  const fcm::Description description = fcm::read_description(module);
  return fit_tile(make_spec(description.module, description.type), description.module.tile, limits);
}

}  // namespace

extern "C" {

const char* ort_fcm_version() { return ORT_FCM_VERSION; }

int ort_fcm_source(const char* module, const char** result) {
  return answer(result, [&] { return kernel_source(fit(module, kUnlimited).spec); });
}

int ort_fcm_resources(const char* module, const char* shared_limit, const char** result) {
  return answer(result, [&] {
    const auto [spec, replaced] = fit(module, {std::stoi(shared_limit), true});
    return fcm::text("tile=", tile_text(spec.tile), "\nthreads=", threads(spec), "\nshared_bytes=", shared_bytes(spec),
                     "\nreplaced=", replaced, "\n");
  });
}

int ort_fcm_compile(const char* module, const char* architecture, const char** result) {
  return answer(result, [&] {
    const std::string source = kernel_source(fit(module, kUnlimited).spec);
    const std::string key = fcm::cubin_key(source, architecture);
    fcm::cached_cubin(key, source, architecture);
    return fcm::cache_path(key);
  });
}

int ort_fcm_nvrtc(const char** result) {
  return answer(result, [] { return fcm::describe_compiler(); });
}

int ort_fcm_cache_directory(const char** result) {
  return answer(result, [] { return fcm::cache_directory(); });
}
}
