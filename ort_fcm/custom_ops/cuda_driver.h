// The slice of the CUDA driver that this library uses, opened when first needed: there is no CUDA header or link.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fcm::cuda {

using Context = struct ContextHandle*;
using Module = struct ModuleHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;
using Event = struct EventHandle*;
using Graph = struct GraphHandle*;
using GraphExec = struct GraphExecHandle*;
using Pointer = unsigned long long;  // device memory

enum DeviceAttribute : int {
  kMultiprocessors = 16,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedBytesPerBlock = 97
};
enum FunctionAttribute : int { kDynamicSharedBytes = 8 };
enum CaptureMode : int { kRelaxed = 2 };
enum StreamFlags : unsigned { kNonBlocking = 1 };

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int serialization;
  };
};
constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Driver {
  int (*init)(unsigned);
  int (*version)(int*);
  int (*error_string)(int, const char**);
  int (*device_attribute)(int*, int attribute, int device);
  int (*device)(int*, int number);
  int (*retain_primary_context)(Context*, int device);
  int (*current_context)(Context*);
  int (*current_device)(int*);
  int (*push_context)(Context);
  int (*pop_context)(Context*);
  int (*exchange_capture_mode)(int*);
  int (*allocate)(Pointer*, size_t);
  int (*release)(Pointer);
  int (*upload)(Pointer, const void*, size_t);
  int (*create_stream)(Stream*, unsigned flags);
  int (*destroy_stream)(Stream);
  int (*synchronise_stream)(Stream);
  int (*begin_capture)(Stream, int mode);
  int (*end_capture)(Stream, Graph*);
  int (*instantiate_graph)(GraphExec*, Graph, unsigned long long flags);
  int (*launch_graph)(GraphExec, Stream);
  int (*destroy_graph)(Graph);
  int (*destroy_graph_exec)(GraphExec);
  int (*create_event)(Event*, unsigned flags);
  int (*record_event)(Event, Stream);
  int (*elapsed)(float* milliseconds, Event start, Event stop);
  int (*destroy_event)(Event);
  int (*load_module)(Module*, const void* image);
  int (*unload_module)(Module);
  int (*get_function)(Function*, Module, const char*);
  int (*set_function_attribute)(Function, int attribute, int value);
  int (*occupancy)(int* blocks, Function, int threads, size_t shared_bytes);
  int (*launch)(const LaunchConfig*, Function, void** arguments, void** extra);
};

// The driver of this machine. Throws Error if there is none, or if it is too old.
const Driver& driver();

// Throws Error with the driver's own words and `what` was tried, unless `result` is success.
void require(int result, const char* what);

// Makes `context` current while it lives, and lets this thread allocate and load while another one captures a graph.
class Current {
 public:
  explicit Current(Context context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int capture_mode_ = kRelaxed;
};

}  // namespace fcm::cuda
