// Kernels on their way to a GPU: compiled in the background, loaded once a context, shared by nodes that are alike.
#pragma once

#include <future>
#include <memory>
#include <string>

#include "cuda_driver.h"

namespace fcm {

// A compilation under way or done.
struct Compilation {
  std::string key;
  std::shared_future<std::string> cubin;  // get() throws Error if it did not compile
};

// Starts compiling `source`, unless a compilation of the same is alive, which is then returned.
std::shared_ptr<Compilation> start_compilation(const std::string& source, const std::string& architecture);

// A loaded kernel; unloads itself.
class DeviceKernel {
 public:
  DeviceKernel(cuda::Context context, const std::string& cubin, int threads, int shared_bytes);
  ~DeviceKernel();
  DeviceKernel(const DeviceKernel&) = delete;
  DeviceKernel& operator=(const DeviceKernel&) = delete;

  cuda::Function function() const { return function_; }
  int held() const { return held_; }  // thread blocks that a multiprocessor has room for

 private:
  cuda::Context context_;
  cuda::Module module_ = nullptr;
  cuda::Function function_ = nullptr;
  int held_ = 0;
};

// Waits for `compilation` and loads its kernel, whose thread blocks have so many threads and bytes of shared memory,
// into `context`, unless it is there already. Throws Error.
std::shared_ptr<DeviceKernel> load_kernel(const Compilation& compilation, cuda::Context context, int threads,
                                          int shared_bytes);

// A block of device memory with a copy of `data`, or with as many copies as fill `bytes`; frees itself.
class DeviceBuffer {
 public:
  DeviceBuffer(cuda::Context context, const std::string& data) : DeviceBuffer(context, data, data.size()) {}
  DeviceBuffer(cuda::Context context, const std::string& data, size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  cuda::Pointer address() const { return address_; }

 private:
  cuda::Context context_;
  cuda::Pointer address_ = 0;
};

}  // namespace fcm
