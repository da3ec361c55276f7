// NVIDIA's run-time compiler, opened when first needed.
#pragma once

#include <string>

namespace fcm {

// Machine code for `architecture` (as "sm_90a") of `source`, which may include the embedded kernel sources. Throws
// Error with the compiler's log.
std::string compile_cubin(const std::string& source, const std::string& architecture);

// All that the machine code depends on beside `source`: options, embedded sources and the compiler's version.
std::string compiler_identity(const std::string& architecture);

// For people: where the compiler was found, and its version. Throws Error if there is none.
std::string describe_compiler();

}  // namespace fcm
