// The slice of ONNX Runtime's C ABI that this library uses, declared here because no package ships the headers.
// The API is an append-only table of function pointers: a Slot names one by its index, result and parameters.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct OpAttribute;
struct Logger;
struct SessionOptions;
struct CustomOpDomain;

constexpr uint32_t kApiVersion = 17;  // a later number is refused by runtimes that would work

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

enum ElementType : int { kFloat = 1, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kCpuInput = -2, kDefault = 0 };
enum AttributeType : int { kInt = 1, kInts = 2, kFloatAttribute = 3, kFloats = 4, kString = 5 };
enum Severity : int { kWarning = 2 };
enum ErrorCode : int { kErrorFail = 1 };

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*kernel_compute)(void* kernel, KernelContext*);
  void (*kernel_destroy)(void* kernel);
  Characteristic (*input_characteristic)(const CustomOp*, size_t);
  Characteristic (*output_characteristic)(const CustomOp*, size_t);
  MemoryType (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_min_arity)(const CustomOp*);
  int (*variadic_input_homogeneity)(const CustomOp*);
  int (*variadic_output_min_arity)(const CustomOp*);
  int (*variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*kernel_compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, ShapeContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int*, int*);
};
static_assert(sizeof(CustomOp) == 208, "the layout that ONNX Runtime reads");

inline const void* const* api_table = nullptr;  // set once, at registration

template <int index, class Result, class... Parameters>
struct Slot {
  Result operator()(Parameters... arguments) const {
    return reinterpret_cast<Result (*)(Parameters...)>(const_cast<void*>(api_table[index]))(arguments...);
  }
};

inline constexpr Slot<0, Status*, int, const char*> create_status;
inline constexpr Slot<2, const char*, const Status*> error_message;
inline constexpr Slot<93, void, Status*> release_status;

inline constexpr Slot<26, Status*, const char*, CustomOpDomain**> create_domain;
inline constexpr Slot<27, Status*, CustomOpDomain*, const CustomOp*> domain_add;
inline constexpr Slot<28, Status*, SessionOptions*, CustomOpDomain*> add_domain;

inline constexpr Slot<57, Status*, TensorInfo**> create_tensor_info;
inline constexpr Slot<58, Status*, TensorInfo*, int> set_element_type;
inline constexpr Slot<59, Status*, TensorInfo*, const int64_t*, size_t> set_dimensions;
inline constexpr Slot<60, Status*, const TensorInfo*, int*> element_type;
inline constexpr Slot<61, Status*, const TensorInfo*, size_t*> dimension_count;
inline constexpr Slot<62, Status*, const TensorInfo*, int64_t*, size_t> dimensions;
inline constexpr Slot<63, Status*, const TensorInfo*, const char**, size_t> symbolic_dimensions;
inline constexpr Slot<271, Status*, TensorInfo*, const char**, size_t> set_symbolic_dimensions;
inline constexpr Slot<99, void, TensorInfo*> release_tensor_info;
inline constexpr Slot<51, Status*, Value*, void**> tensor_data;
inline constexpr Slot<65, Status*, const Value*, TensorInfo**> tensor_info;

inline constexpr Slot<230, Status*, const KernelInfo*, size_t*> input_count;
inline constexpr Slot<232, Status*, const KernelInfo*, size_t, char*, size_t*> input_name;
inline constexpr Slot<231, Status*, const KernelInfo*, size_t*> output_count;
inline constexpr Slot<233, Status*, const KernelInfo*, size_t, char*, size_t*> output_name;
inline constexpr Slot<244, Status*, const KernelInfo*, char*, size_t*> node_name;
inline constexpr Slot<249, Status*, const KernelInfo*, size_t, int*, const Value**> constant_input;
inline constexpr Slot<85, Status*, const KernelInfo*, const char*, float*> attribute_float;
inline constexpr Slot<86, Status*, const KernelInfo*, const char*, int64_t*> attribute_int;
inline constexpr Slot<87, Status*, const KernelInfo*, const char*, char*, size_t*> attribute_string;
inline constexpr Slot<162, Status*, const KernelInfo*, const char*, float*, size_t*> attribute_floats;
inline constexpr Slot<163, Status*, const KernelInfo*, const char*, int64_t*, size_t*> attribute_ints;
inline constexpr Slot<245, Status*, const KernelInfo*, const Logger**> kernel_logger;
inline constexpr Slot<247, Status*, const Logger*, int, const char*, const char*, int, const char*> log_message;

inline constexpr Slot<90, Status*, const KernelContext*, size_t, const Value**> kernel_input;
inline constexpr Slot<91, Status*, KernelContext*, size_t, const int64_t*, size_t, Value**> kernel_output;
inline constexpr Slot<193, Status*, const KernelContext*, void**> compute_stream;
inline constexpr Slot<265, Status*, const KernelContext*, int, int, void**> resource;
inline constexpr Slot<274, Status*, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*> parallel_for;

inline constexpr Slot<267, Status*, const ShapeContext*, size_t*> shape_input_count;
inline constexpr Slot<268, Status*, const ShapeContext*, size_t, TensorInfo**> shape_input;
inline constexpr Slot<269, Status*, const ShapeContext*, const char*, const OpAttribute**> shape_attribute;
inline constexpr Slot<270, Status*, const ShapeContext*, size_t, const TensorInfo*> set_output_shape;
inline constexpr Slot<272, Status*, const OpAttribute*, int, void*, size_t, size_t*> read_attribute;

// True when `status` reports success; releases it.
inline bool succeeded(Status* status) {
  if (status) release_status(status);
  return !status;
}

}  // namespace ort
