#include "device_kernel.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "cubin_cache.h"
#include "error.h"

namespace fcm {
namespace {

// Lets as many compilations run at once as there are processors, but no more than `kMost`: each takes memory.
class Turnstile {
 public:
  void enter() {
    std::unique_lock lock(mutex_);
    free_again_.wait(lock, [&] { return free_ > 0; });
    --free_;
  }
  void leave() {
    std::lock_guard lock(mutex_);
    ++free_;
    free_again_.notify_one();
  }

 private:
  static constexpr unsigned kMost = 16;
  std::mutex mutex_;
  std::condition_variable free_again_;
  unsigned free_ = std::clamp(std::thread::hardware_concurrency(), 1u, kMost);
};

std::string compile_in_turn(const std::string& key, const std::string& source, const std::string& architecture) {
  static Turnstile& turnstile = *new Turnstile;  // outlives threads that end after main
  struct Turn {
    Turn() { turnstile.enter(); }
    ~Turn() { turnstile.leave(); }
  } turn;
  return cached_cubin(key, source, architecture);
}

// Objects by key that live as long as somebody holds them. Never destroyed, for holders that outlive main.
template <class Key, class T>
struct Shared {
  std::mutex mutex;
  std::map<Key, std::weak_ptr<T>> objects;

  template <class Make>
  std::shared_ptr<T> get(const Key& key, Make make) {
    std::lock_guard lock(mutex);
    std::weak_ptr<T>& known = objects[key];
    std::shared_ptr<T> object = known.lock();
    if (!object) known = object = make();
    return object;
  }
};

// For destructors: at the end of a process the context may be gone, and what it held with it.
template <class Work>
void in_context(cuda::Context context, Work work) noexcept {
  try {
    const cuda::Current current(context);
    work();
  } catch (const Error&) {
  }
}

}  // namespace

std::shared_ptr<Compilation> start_compilation(const std::string& source, const std::string& architecture) {
  static auto& compilations = *new Shared<std::string, Compilation>;
  const std::string key = cubin_key(source, architecture);
  return compilations.get(key, [&] {
    auto future = std::async(std::launch::async, compile_in_turn, key, source, architecture);
    return std::make_shared<Compilation>(Compilation{key, future.share()});
  });
}

DeviceKernel::DeviceKernel(cuda::Context context, const std::string& cubin, int threads, int shared_bytes)
    : context_(context) {
  const cuda::Driver& driver = cuda::driver();
  const cuda::Current current(context);
  int version = 0;
  driver.version(&version);
  const std::string loading =
      text("loading a kernel with the driver for CUDA ", version / 1000, ".", version % 1000 / 10);
  cuda::require(driver.load_module(&module_, cubin.data()), loading.c_str());
  try {
    cuda::require(driver.get_function(&function_, module_, "fcm_module"), "finding the kernel");
    cuda::require(driver.set_function_attribute(function_, cuda::kDynamicSharedBytes, shared_bytes),
                  "reserving shared memory");
    cuda::require(driver.occupancy(&held_, function_, threads, shared_bytes), "asking how many thread blocks fit");
  } catch (...) {
    driver.unload_module(module_);
    throw;
  }
}

DeviceKernel::~DeviceKernel() {
  in_context(context_, [&] { cuda::driver().unload_module(module_); });
}

std::shared_ptr<DeviceKernel> load_kernel(const Compilation& compilation, cuda::Context context, int threads,
                                          int shared_bytes) {
  static auto& kernels = *new Shared<std::pair<cuda::Context, std::string>, DeviceKernel>;
  const std::string& cubin = compilation.cubin.get();
  return kernels.get({context, compilation.key},
                     [&] { return std::make_shared<DeviceKernel>(context, cubin, threads, shared_bytes); });
}

DeviceBuffer::DeviceBuffer(cuda::Context context, const std::string& data, size_t bytes) : context_(context) {
  const cuda::Driver& driver = cuda::driver();
  const cuda::Current current(context);
  cuda::require(driver.allocate(&address_, bytes), text("allocating ", bytes, " bytes").c_str());
  int error = 0;
  for (size_t at = 0; at < bytes && !error; at += data.size())
    error = driver.upload(address_ + at, data.data(), std::min(data.size(), bytes - at));
  if (!error) error = driver.synchronise_stream(nullptr);  // ONNX Runtime's own streams do not wait for the upload
  if (error) driver.release(address_);
  cuda::require(error, "uploading data");
}

DeviceBuffer::~DeviceBuffer() {
  in_context(context_, [&] { cuda::driver().release(address_); });
}

}  // namespace fcm
