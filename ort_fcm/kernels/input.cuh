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
    if constexpr (S.scaled)
      if (valid) v = scale<COUNT>(p, v, n, k);
    // A depthwise multiplies in full precision; what is normalised, or summed up, is rounded after that.
    return KIND == Dense::none || normalises(S) ? v : L::operand(v);
  }

  // COUNT channels of image n from k on, times their factors.
  template <int COUNT>
  FCM_DEVICE static Vec scale(const Params& p, Vec v, int n, int k) {
    if (k >= S.c_in) return v;
    const char* from = (const char*)p.scale + ((long long)n * S.c_in + k) * L::kElement;
    Vec factor{};
    if constexpr (S.c_in % L::kLane) {
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        if (k + i >= S.c_in) continue;
        if constexpr (L::kHalf)
          factor.r[i / 2] |= (u32)((const unsigned short*)from)[i] << i % 2 * 16;
        else
          factor.r[i] = ((const u32*)from)[i];
      }
    } else if constexpr (COUNT == L::kLane) {
      factor = *(const Vec*)from;
    } else {
      const HalfVec h = *(const HalfVec*)from;
      factor.r[0] = h.r[0], factor.r[1] = h.r[1];
    }
    FCM_UNROLL
    for (int i = 0; i < 4; ++i)
      v.r[i] =
          L::kHalf ? half2_multiply(v.r[i], factor.r[i]) : float_bits(bits_float(v.r[i]) * bits_float(factor.r[i]));
    return v;
  }

  // X under the halo region in shared memory, zero outside of X, where a dense convolution comes first: rows start at
  // an even column, so that halves can be copied in pairs, and read in pairs where windows start at even columns.
  struct Staged {
    static constexpr Window W = S.first_window;
    static constexpr int kRows = stages_input(S) ? staged_h(S) : 1, kPitch = stages_input(S) ? staged_pitch(S) : 2;
    static constexpr bool kPairs = reads_pairs(S);
    static constexpr int kTapColumns = first_columns(S), kTaps = W.kernel_h * kTapColumns, kSteps = first_steps(S),
                         kGroups = ceil_div(kSteps, 2);
    const char* from;
    int taps[stages_input(S) ? kGroups : 1][L::kLane];  // offsets of this lane's share of the reduction

    FCM_DEVICE static int left(int x) { return x * W.stride_w - W.pad_left; }

    FCM_DEVICE Staged(const char* staged, int halo_x) : from(staged) {
      if constexpr (stages_input(S)) {
        FCM_UNROLL
        for (int kg = 0; kg < kGroups; ++kg) {
          FCM_UNROLL
          for (int i = 0; i < L::kLane; ++i) {
            const int k = kg * L::kGroup + L::column() * share(kg) + i;
            const int c = k / kTaps, ky = k % kTaps / kTapColumns, kx = k % kTapColumns;
            taps[kg][i] = (k < first_depth(S) ? (c * kRows + ky * W.dilation_h) * kPitch + kx * W.dilation_w : 0) +
                          (kPairs ? 0 : left(halo_x) & 1);
          }
        }
      }
    }
    static constexpr int share(int kg) { return kSteps % 2 && kg == kSteps / 2 ? L::kLane / 2 : L::kLane; }

    // `y`, `x`: the halo region's corner on the middle map.
    FCM_DEVICE static void copy(const Params& p, char* to, int image0, int images, int y, int x) {
      constexpr int kWord = L::kHalf ? 2 : 1, kColumns = kPitch / kWord;  // elements of four bytes
      constexpr int kAll = S.tile.images * S.c_in * kRows * kColumns;
      const int top = y * W.stride_h - W.pad_top, first = left(x) & ~1;
      const bool words = S.input_nchw && p.in_w % kWord == 0;
      FCM_UNROLL
      for (int i0 = 0; i0 < kAll; i0 += threads(S)) {
        const int i = i0 + thread_index();
        if (i >= kAll) break;
        const int column = i % kColumns * kWord, row = i / kColumns % kRows, plane = i / (kColumns * kRows);
        const int c = plane % S.c_in, image = plane / S.c_in, sy = top + row, sx = first + column;
        const bool inside = image < images && sy >= 0 && sy < p.in_h;
        if (words) {
          const bool valid = inside && sx >= 0 && sx < p.in_w;
          const long long at = (((long long)(image0 + image) * S.c_in + c) * p.in_h + sy) * p.in_w + sx;
          copy_async4(to + i * 4, (const char*)p.x + (valid ? at * L::kElement : 0), valid);
        } else {
          u32 word = 0;
          FCM_UNROLL
          for (int j = 0; j < kWord; ++j)
            if (inside && sx + j >= 0 && sx + j < p.in_w) word |= element(p, image0 + image, c, sy, sx + j) << 16 * j;
          *(u32*)(to + i * 4) = word;
        }
      }
    }
    // As load_group of the pixel at (y, x) of the halo region.
    FCM_DEVICE Vec load(int image, int y, int x, int kg) const {
      const int pixel = (image * S.c_in * kRows + y * W.stride_h) * kPitch + x * W.stride_w;
      Vec v{};
      FCM_UNROLL
      for (int i = 0; i < L::kLane; ++i) {
        if (i >= share(kg)) continue;
        if constexpr (kPairs) {
          if (i % 2 == 0) v.r[i / 2] = *(const u32*)((const unsigned short*)from + pixel + taps[kg][i]);
        } else if constexpr (L::kHalf) {
          const u32 e = ((const unsigned short*)from)[pixel + taps[kg][i]];
          v.r[i / 2] |= i % 2 ? e << 16 : e;
        } else {
          v.r[i] = ((const u32*)from)[pixel + taps[kg][i]];
        }
      }
      return L::operand(v);
    }
  };

  // What a streaming project multiplies with element k of its weights, at output pixel (y, x); `inside`: is there any?
  FCM_DEVICE static const char* stream_address(const Params& p, int n, int y, int x, int k, bool& inside) {
    constexpr Window w = S.project_window;
    if constexpr (S.project != Dense::convolution) {
      return address(p, w, n, y, x, k);
    } else {
      const int tap = k / S.c_in, ky = tap / w.kernel_w, kx = tap % w.kernel_w;
      const int sy = y * w.stride_h + ky * w.dilation_h - w.pad_top;
      const int sx = x * w.stride_w + kx * w.dilation_w - w.pad_left;
      inside = sy >= 0 && sy < p.in_h && sx >= 0 && sx < p.in_w;
      return address(p, Window{}, n, sy, sx, k - tap * S.c_in);
    }
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
