// Reading X: NHWC in 16-byte vectors where channels allow, else NHWC or NCHW element by element; and the implicit GEMM
// of a dense convolution, whose "channels" are (input channel, filter row, filter column).
#pragma once

#include "lanes.cuh"

namespace fcm {

template <class C>
struct Input {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;

  FCM_DEVICE static u32 element(const Params& p, int n, int c, int y, int x) {
    const long long i = S.input_nchw ? (((long long)n * S.c_in + c) * p.in_h + y) * p.in_w + x
                                     : (((long long)n * p.in_h + y) * p.in_w + x) * S.c_in + c;
    if constexpr (L::kHalf) return ((const unsigned short*)p.x)[i];
    return ((const u32*)p.x)[i];
  }

  // COUNT channels from k on of the pixel at (y, x) of the convolution's result; zero outside of X.
  template <Dense KIND, int COUNT>
  FCM_DEVICE static Vec load(const Params& p, const Window& w, int n, int y, int x, int k, bool valid) {
    Vec v{};
    if constexpr (KIND != Dense::convolution && vector_input(S)) {
      if (valid && k < S.c_in) {
        const char* from = address(p, w, n, y, x, k);
        if constexpr (COUNT == L::kLane) {
          v = *(const Vec*)from;
        } else {
          const HalfVec h = *(const HalfVec*)from;
          v.r[0] = h.r[0], v.r[1] = h.r[1];
        }
      }
    } else {
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        int c = k + i, sy = y * w.stride_h, sx = x * w.stride_w;
        bool inside = valid;
        if constexpr (KIND == Dense::convolution) {
          const int kx = c % w.kernel_w, ky = c / w.kernel_w % w.kernel_h;
          c = c / (w.kernel_w * w.kernel_h);
          sy += ky * w.dilation_h - w.pad_top, sx += kx * w.dilation_w - w.pad_left;
          inside = valid && sy >= 0 && sy < p.in_h && sx >= 0 && sx < p.in_w;
        }
        const u32 e = inside && c < S.c_in ? element(p, n, c, sy, sx) : 0;
        if constexpr (L::kHalf)
          v.r[i / 2] |= i % 2 ? e << 16 : e;
        else
          v.r[i] = e;
      }
    }
    return L::operand(v);
  }

  FCM_DEVICE static const char* address(const Params& p, const Window& w, int n, int y, int x, int k) {
    const long long pixel = ((long long)n * p.in_h + y * w.stride_h) * p.in_w + x * w.stride_w;
    return (const char*)p.x + (pixel * S.c_in + k) * L::kElement;
  }

  // The same channels of the groups of a reduction of DEPTH, for a fragment: group `kg`, this lane's share.
  template <Dense KIND, int DEPTH>
  FCM_DEVICE static Vec load_group(const Params& p, const Window& w, int n, int y, int x, int kg, bool valid) {
    constexpr int kSteps = ceil_div(DEPTH, L::kGroup / 2);
    if (kSteps % 2 && kg == kSteps / 2)
      return load<KIND, L::kLane / 2>(p, w, n, y, x, kg * L::kGroup + L::column() * (L::kLane / 2), valid);
    return load<KIND, L::kLane>(p, w, n, y, x, kg * L::kGroup + L::column() * L::kLane, valid);
  }
};

}  // namespace fcm
