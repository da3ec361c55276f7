// C functions for tools and tests: what the library would do for a module, without ONNX Runtime; but for measuring,
// without a GPU. Each returns 0 and sets `result`, or returns 1 and sets it to what is wrong; the text lives until the
// thread's next call.
#include <sstream>

#include "cubin_cache.h"
#include "description.h"
#include "error.h"
#include "measure.h"
#include "nvrtc.h"
#include "specialise.h"

namespace {

constexpr fcm::Limits kUnlimited{1 << 30, true, true};

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
  fcm::Description description = fcm::read_description(module);
  const fcm::Module as_run = staged(std::move(description.module));
  return fit_tile(make_spec(as_run, description.type), as_run.tile, limits);
}

}  // namespace

extern "C" {

const char* ort_fcm_version() { return ORT_FCM_VERSION; }

int ort_fcm_source(const char* module, const char** result) {
  return answer(result, [&] { return kernel_source(fit(module, kUnlimited).spec); });
}

int ort_fcm_resources(const char* module, const char* shared_limit, const char** result) {
  return answer(result, [&] {
    const auto [spec, replaced] = fit(module, {std::stoi(shared_limit), true, true});
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

// `x_shape`: four numbers separated by spaces. The result is microseconds.
int ort_fcm_measure(const char* module, const char* x_shape, const char** result) {
  return answer(result, [&] {
    std::istringstream numbers(x_shape);
    std::vector<int64_t> shape;
    for (int64_t n; numbers >> n;) shape.push_back(n);
    return fcm::text(fcm::measure(fcm::read_description(module), shape));
  });
}

int ort_fcm_nvrtc(const char** result) {
  return answer(result, [] { return fcm::describe_compiler(); });
}

int ort_fcm_cache_directory(const char** result) {
  return answer(result, [] { return fcm::cache_directory(); });
}
}
