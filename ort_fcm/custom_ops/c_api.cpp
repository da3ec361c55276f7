// C functions for tools and tests: what the library would do for a module, without ONNX Runtime.
extern "C" const char* ort_fcm_version() { return ORT_FCM_VERSION; }
