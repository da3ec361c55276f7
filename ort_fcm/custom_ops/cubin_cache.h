// Compiled kernels, kept on disk between processes. Each file ends with a checksum of what is before it, and appears
// whole by being renamed; so a crash, a race or a damaged file costs a compilation, never a wrong kernel.
#pragma once

#include <string>

namespace fcm {

// ORT_FCM_CACHE, or ort_fcm under the user's cache directory; empty if neither is known.
std::string cache_directory();

// The file of `key` in the cache.
std::string cache_path(const std::string& key);

// What names the kernel of `source` for `architecture` among all kernels, options and compilers.
std::string cubin_key(const std::string& source, const std::string& architecture);

// The machine code for `key`, from the cache or else compiled and stored. Throws Error if it does not compile; a cache
// that cannot be read or written is done without.
std::string cached_cubin(const std::string& key, const std::string& source, const std::string& architecture);

}  // namespace fcm
