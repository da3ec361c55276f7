// Weights in the order in which the kernels read them (lanes.cuh says why): each 16 bytes are what one lane of a warp
// multiplies with, and a chunk of middle channels is contiguous. Channels that pad a group, and groups that pad a
// chunk, are zero. Host only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "half.h"
#include "spec.h"

namespace fcm {

inline void put_element(const Spec& s, void* to, float x) {
  if (s.type == Type::float16) {
    const std::uint16_t h = float_to_half(x);
    std::memcpy(to, &h, 2);
  } else {
    const float f = s.type == Type::tf32 ? round_to_tf32(x) : x;
    std::memcpy(to, &f, 4);
  }
}

// One operand block: 8 output channels of which lane row g is `channel(g)`, and STEPS halves of reduction group `kg`.
// w is [outputs][depth], of which the k-th product has element `place(k)`, or none where that is negative.
template <class Channel, class Place>
void pack_block(const Spec& s, const float* w, int outputs, int depth, int kg, int steps, Channel channel, Place place,
                char* to) {
  const int per_lane = lane_channels(s.type) * steps / 2, per_register = lane_channels(s.type) / 4;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < per_lane; ++i) {
      const int n = channel(lane / 4), k = kg * group(s.type) + lane % 4 * per_lane + i;
      const int at_w = place(k);
      const float x = n < outputs && at_w >= 0 && at_w < depth ? w[(std::size_t)n * depth + at_w] : 0.f;
      int at = lane * (steps * 8) + i / per_register * 4 + i % per_register * element_bytes(s.type);
      const int byte = i * element_bytes(s.type);  // of a lane's 16, where a warpgroup multiplies two steps always
      if (from_registers(s))                       // of four registers
        at = swizzled(lane / 4, byte / 4) + lane % 4 * 4 + byte % 4;
      else if (s.tile.wgmma)
        at = swizzled(lane / 4, lane % 4) + byte;
      put_element(s, to + at, x);
    }
}

// A gate's weights: rows as Conv has them, padded to whole lanes and to a share for each block of a cluster.
inline std::size_t packed_gate_bytes(const Spec& s, int outputs, int depth) {
  return (std::size_t)s.tile.split * gate_weight_bytes(s, outputs, depth);
}
inline void pack_gate(const Spec& s, const float* w, int outputs, int depth, void* out) {
  std::memset(out, 0, packed_gate_bytes(s, outputs, depth));
  for (int row = 0; row < outputs; ++row)
    for (int k = 0; k < depth; ++k) {
      char* to = (char*)out + ((std::size_t)row * gate_depth(s, depth) + k) * element_bytes(s.type);
      const float x = w[(std::size_t)row * depth + k];
      if (s.type == Type::float16)
        put_element(s, to, x);
      else
        std::memcpy(to, &x, 4);  // no tensor core here
    }
}

inline std::size_t packed_first_bytes(const Spec& s) {
  if (is_gate(s)) return packed_gate_bytes(s, s.c_mid, s.c_in);
  return s.first == Dense::none ? 0 : (std::size_t)packed_groups(s) * first_group_bytes(s);
}
// w: [c_mid, depth], the weight as Conv has it.
inline void pack_first(const Spec& s, const float* w, void* out) {
  if (is_gate(s)) return pack_gate(s, w, s.c_mid, s.c_in, out);
  const Window& window = s.first_window;
  const int g = group(s.type), lane = lane_channels(s.type), steps = first_steps(s);
  const int depth = dense_depth(s.first, window, s.c_in), columns = first_columns(s);
  const auto place = [&](int k) {
    if (!reads_pairs(s)) return first_tap(s, k);
    const int column = k % columns - first_lead(s);
    return column >= 0 && column < window.kernel_w ? k / columns * window.kernel_w + column : -1;
  };
  char* to = (char*)out;
  for (int mg = 0; mg < packed_groups(s); ++mg)
    for (int j = 0; j < g / 8; ++j) {
      const auto channel = [&](int r) { return mg * g + r / 2 * lane + 2 * j + r % 2; };
      for (int kg = 0; kg * 2 < steps; ++kg) {
        const int here = s.tile.wgmma ? 2 : min(2, steps - kg * 2);
        pack_block(s, w, s.c_mid, depth, kg, here, channel, place, to);
        to += here * 256;
      }
    }
}

inline std::size_t packed_depthwise_bytes(const Spec& s) {
  return s.depthwise ? (std::size_t)packed_groups(s) * depthwise_group_bytes(s) : 0;
}
// w: [c_mid, 1, kernel_h, kernel_w].
inline void pack_depthwise(const Spec& s, const float* w, void* out) {
  const int g = group(s.type), taps = depthwise_taps(s);
  char* to = (char*)out;
  for (int mg = 0; mg < packed_groups(s); ++mg)
    for (int tap = 0; tap < taps; ++tap)
      for (int c = mg * g; c < (mg + 1) * g; ++c, to += element_bytes(s.type)) {
        const float x = c < s.c_mid ? w[(std::size_t)c * taps + tap] : 0.f;
        if (s.type == Type::tf32)
          std::memcpy(to, &x, 4);  // no tensor core here
        else
          put_element(s, to, x);
      }
}

inline std::size_t packed_project_bytes(const Spec& s) {
  if (is_gate(s)) return packed_gate_bytes(s, s.c_out, s.c_mid);
  return has_project(s) ? (std::size_t)packed_groups(s) * (padded_out(s) / 8) * kFragment : 0;
}
// w: [c_out, depth]. Where only X's deviation is to count, rows without their mean do not see that of X.
inline void pack_project(const Spec& s, const float* w, void* out) {
  if (is_gate(s)) return pack_gate(s, w, s.c_out, s.c_mid, out);
  std::vector<float> centred;
  if (takes_moments(s)) {
    centred.assign(w, w + (std::size_t)s.c_out * s.c_in);
    for (std::size_t row = 0; row < centred.size(); row += s.c_in) {
      double mean = 0;
      for (int k = 0; k < s.c_in; ++k) mean += w[row + k] / (double)s.c_in;
      for (int k = 0; k < s.c_in; ++k) centred[row + k] = (float)(w[row + k] - mean);
    }
    w = centred.data();
  }
  const int g = group(s.type), blocks = g / 8, depth = middle_channels(s);
  const int taps = depth / s.c_in;  // of a dense convolution that streams: all channels under a tap, then the next
  const bool by_tap = s.project == Dense::convolution && streams_input(s);
  char* to = (char*)out;
  for (int kg = 0; kg < packed_groups(s); ++kg)
    for (int b = 0; b < padded_out(s) / 8; ++b, to += kFragment) {
      const int base = b / blocks * g, j = b % blocks;
      const int lane = base + g > padded_out(s) ? lane_channels(s.type) / 2 : lane_channels(s.type);
      pack_block(
          s, w, s.c_out, depth, kg, 2, [&](int r) { return base + r / 2 * lane + 2 * j + r % 2; },
          [&](int k) { return by_tap && k < depth ? k % s.c_in * taps + k / s.c_in : k; }, to);
    }
}

// Biases and slopes stay in channel order, padded with zeros; `padded_vector` is their length in floats.
inline int padded_vector(const Spec& s, bool project) {
  return project ? round_up(s.c_out, group(s.type)) : packed_groups(s) * group(s.type);
}
inline void pack_vector(const float* v, int channels, int padded, float* out) {
  for (int c = 0; c < padded; ++c) out[c] = v && c < channels ? v[c] : 0.f;
}

}  // namespace fcm
