#include "cuda_driver.h"

#include <dlfcn.h>

#include "error.h"

namespace fcm::cuda {
namespace {

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("the CUDA driver (libcuda.so.1) is not found");
  Driver driver{};
  const auto bind = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (!function) fail("the CUDA driver is too old: it lacks ", name);
  };
  bind(driver.init, "cuInit");
  bind(driver.version, "cuDriverGetVersion");
  bind(driver.error_string, "cuGetErrorString");
  bind(driver.device_attribute, "cuDeviceGetAttribute");
  bind(driver.device, "cuDeviceGet");
  bind(driver.retain_primary_context, "cuDevicePrimaryCtxRetain");
  bind(driver.current_context, "cuCtxGetCurrent");
  bind(driver.current_device, "cuCtxGetDevice");
  bind(driver.push_context, "cuCtxPushCurrent_v2");
  bind(driver.pop_context, "cuCtxPopCurrent_v2");
  bind(driver.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  bind(driver.allocate, "cuMemAlloc_v2");
  bind(driver.release, "cuMemFree_v2");
  bind(driver.upload, "cuMemcpyHtoD_v2");
  bind(driver.create_stream, "cuStreamCreate");
  bind(driver.destroy_stream, "cuStreamDestroy_v2");
  bind(driver.synchronise_stream, "cuStreamSynchronize");
  bind(driver.begin_capture, "cuStreamBeginCapture_v2");
  bind(driver.end_capture, "cuStreamEndCapture");
  bind(driver.instantiate_graph, "cuGraphInstantiateWithFlags");
  bind(driver.launch_graph, "cuGraphLaunch");
  bind(driver.destroy_graph, "cuGraphDestroy");
  bind(driver.destroy_graph_exec, "cuGraphExecDestroy");
  bind(driver.create_event, "cuEventCreate");
  bind(driver.record_event, "cuEventRecord");
  bind(driver.elapsed, "cuEventElapsedTime");
  bind(driver.destroy_event, "cuEventDestroy_v2");
  bind(driver.load_module, "cuModuleLoadData");
  bind(driver.unload_module, "cuModuleUnload");
  bind(driver.get_function, "cuModuleGetFunction");
  bind(driver.set_function_attribute, "cuFuncSetAttribute");
  bind(driver.occupancy, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  bind(driver.launch, "cuLaunchKernelEx");
  if (driver.init(0)) fail("the CUDA driver finds no usable GPU");
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

void require(int result, const char* what) {
  if (!result) return;
  const char* reason = nullptr;
  driver().error_string(result, &reason);
  fail(what, " failed: ", reason ? reason : "unknown error", " (CUDA driver error ", result, ")");
}

Current::Current(Context context) {
  require(driver().push_context(context), "making the CUDA context current");
  driver().exchange_capture_mode(&capture_mode_);
}

Current::~Current() {
  Context ignored;
  driver().exchange_capture_mode(&capture_mode_);
  driver().pop_context(&ignored);
}

}  // namespace fcm::cuda
