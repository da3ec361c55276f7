// From a Module to what the kernels are compiled for: a Spec with a tile that fits the device, and the source for it.
#pragma once

#include <string>

#include "module.h"

namespace fcm {

// What a tile must fit.
struct Limits {
  int shared_bytes;  // that a thread block may ask for
  bool clusters;     // sm_90 and later
  bool warpgroups;   // wgmma: sm_90 alone
};

// A lone stem as its kernel runs it: in front of a depthwise that passes its result on, since the input of such a first
// stage is staged in shared memory. Other modules as they are.
Module staged(Module module);

// A module without its weights, as the kernels see it; the tile is not filled in.
Spec make_spec(const Module& module, Type type);

struct Fitted {
  Spec spec;
  std::string replaced;  // why the node's own tile could not be used; empty if it was, or if the node has none
};

// Reads the attribute `tile` and, where it is empty or does not fit, takes the library's own. Throws Error if the
// attribute is malformed or if no tile fits.
Fitted fit_tile(Spec spec, const std::string& tile, const Limits& limits);

std::string tile_text(const Tile& tile);  // as the attribute writes it

// CUDA source that defines the kernel `fcm_module` for `spec`.
std::string kernel_source(const Spec& spec);

}  // namespace fcm
