// Reading X: NHWC in 16-byte vectors where channels allow, else NHWC or NCHW element by element; and the implicit GEMM
// of a dense convolution, whose "channels" are (input channel, filter row, filter column).
#pragma once

#include "tile.cuh"

namespace fcm {

template <class C>
struct Input {
  using L = Lanes<C>;
  using T = TilePlace<C>;
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
  // a column of X that is a multiple of kVector, so that vectors of 16 bytes can be copied where X has whole ones.
  struct Staged {
    static constexpr Window W = S.first_window;
    static constexpr int kRows = stages_input(S) ? staged_h(S) : 1, kPitch = stages_input(S) ? staged_pitch(S) : 2;
    static constexpr bool kPairs = reads_pairs(S);
    static constexpr int kVector = 16 / L::kElement;
    static constexpr int kTapColumns = first_columns(S), kTaps = W.kernel_h * kTapColumns, kSteps = first_steps(S),
                         kGroups = ceil_div(kSteps, 2);
    const char* from;
    int taps[stages_input(S) ? kGroups : 1][L::kLane];  // byte offsets of this lane's share of the reduction

    // The first column that a halo region's windows read, and what lies in front of it in a row.
    FCM_DEVICE static int left(int x) { return x * W.stride_w - W.pad_left - first_lead(S); }
    FCM_DEVICE static int lead(int x) { return left(x) & (kVector - 1); }

    // Of the i-th of lane `column`'s share of a group; a lane that has none reads what the lane before it does.
    // `fixed`: whether it is as far from the first in all lanes.
    struct Taps {
      int at[kGroups][L::kLane][4];
      bool fixed[kGroups][L::kLane];
    };
    static constexpr Taps find_taps() {
      Taps taps{};
      for (int kg = 0; kg < kGroups; ++kg)
        for (int i = 0; i < share(kg); ++i) {
          taps.fixed[kg][i] = true;
          for (int column = 0, at = 0; column < 4; ++column) {
            const int tap = first_tap(S, kg * L::kGroup + column * share(kg) + i);
            const int c = tap / kTaps, ky = tap % kTaps / kTapColumns, kx = tap % kTapColumns;
            if (tap >= 0 && tap < first_depth(S))
              at = ((c * kRows + ky * W.dilation_h) * kPitch + kx * W.dilation_w) * L::kElement;
            taps.at[kg][i][column] = at;
            taps.fixed[kg][i] &= at - taps.at[0][0][column] == taps.at[kg][i][0] - taps.at[0][0][0];
          }
        }
      return taps;
    }
    FCM_DEVICE Staged(const char* staged, int halo_x) : from(staged + lead(halo_x) * L::kElement) {
      if constexpr (stages_input(S)) {
        constexpr Taps all = find_taps();
        FCM_UNROLL
        for (int kg = 0; kg < kGroups; ++kg) {
          FCM_UNROLL
          for (int i = 0; i < L::kLane; ++i) {
            const int (&at)[4] = all.at[kg][i];
            const int even = L::column() & 2 ? at[2] : at[0], odd = L::column() & 2 ? at[3] : at[1];
            taps[kg][i] = L::column() & 1 ? odd : even;
          }
        }
      }
    }
    FCM_DEVICE int tap(int kg, int i) const {
      constexpr Taps all = find_taps();
      return all.fixed[kg][i] ? taps[0][0] + (all.at[kg][i][0] - all.at[0][0][0]) : taps[kg][i];
    }
    static constexpr int share(int kg) { return kSteps % 2 && kg == kSteps / 2 ? L::kLane / 2 : L::kLane; }

    // Vectors of 16 bytes that lie in X or outside of it, where rows of X are made of them.
    FCM_DEVICE static bool copies_vectors(const Params& p) { return S.input_nchw && p.in_w % kVector == 0; }
    static constexpr int kVectors = ceil_div(staged_columns(S), kVector), kLines = S.tile.images * S.c_in * kRows,
                         kEach = ceil_div(kLines * kVectors, threads(S));
    // Each thread's vectors, as elements of X from image `at.image0` on, or negative.
    FCM_DEVICE static void find(const Params& p, int (&vectors)[kEach], const T& at) {
      const int thread = anew(thread_index());
      FCM_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const int i = e * threads(S) + thread;
        vectors[e] = element_at(p, at, i / kVectors, i % kVectors * kVector);
      }
    }
    FCM_DEVICE static int element_at(const Params& p, const T& at, int line, int column) {
      const int row = line % kRows, plane = line / kRows, image = plane / S.c_in, c = plane - image * S.c_in;
      const int y = at.halo_y() * W.stride_h - W.pad_top + row, x = left(at.halo_x()) - lead(at.halo_x()) + column;
      const bool valid = image < at.images && y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
      if (!valid) return -1;
      return S.input_nchw ? (plane * p.in_h + y) * p.in_w + x : ((image * p.in_h + y) * p.in_w + x) * S.c_in + c;
    }
    FCM_DEVICE static void copy(const Params& p, char* to, const int (&vectors)[kEach], const T& at) {
      const char* from = (const char*)p.x + (long long)at.image0 * S.c_in * p.in_h * p.in_w * L::kElement;
      if (copies_vectors(p)) {
        FCM_UNROLL
        for (int e = 0; e < kEach; ++e) {
          const int i = e * threads(S) + thread_index(), line = i / kVectors;
          if ((e + 1) * threads(S) > kLines * kVectors && line >= kLines) break;
          copy_async(to + (line * kPitch + i % kVectors * kVector) * L::kElement,
                     from + (long long)max(vectors[e], 0) * L::kElement, vectors[e] >= 0);
        }
      } else {
        constexpr int kColumns = staged_columns(S);
        for (int i = anew(thread_index()); i < kLines * kColumns; i += threads(S)) {
          const int line = i / kColumns, at_element = element_at(p, at, line, i % kColumns);
          char* place = to + (line * kPitch + i % kColumns) * L::kElement;
          if constexpr (L::kHalf)
            *(unsigned short*)place = at_element < 0 ? (unsigned short)0 : ((const unsigned short*)from)[at_element];
          else
            *(u32*)place = at_element < 0 ? 0 : ((const u32*)from)[at_element];
        }
      }
    }
    // The bytes from the halo region's corner to the pixel at (y, x) of it.
    FCM_DEVICE static int offset(int image, int y, int x) {
      return ((image * S.c_in * kRows + y * W.stride_h) * kPitch + x * W.stride_w) * L::kElement;
    }
    // As load_group of the pixel at `offset`, but as it is.
    FCM_DEVICE Vec load(int offset, int kg) const {
      Vec v{};
      FCM_UNROLL
      for (int i = 0; i < L::kLane; ++i) {
        if (i >= share(kg)) continue;
        if constexpr (kPairs) {
          if (i % 2 == 0) v.r[i / 2] = *(const u32*)(from + offset + tap(kg, i));
        } else if constexpr (L::kHalf) {
          const u32 e = *(const unsigned short*)(from + offset + tap(kg, i));
          v.r[i / 2] |= i % 2 ? e << 16 : e;
        } else {
          v.r[i] = *(const u32*)(from + offset + tap(kg, i));
        }
      }
      return v;
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

  // Where pixels of X are vectors: the first channel of a pixel of the halo region, as its corner's and the pixels from
  // there; and of what output pixel (py, side) of this lane reads, null where there is none.
  static constexpr bool kWholePixels = vector_input(S) && S.first == Dense::pointwise && !S.scaled;
  FCM_DEVICE static const char* halo_corner(const Params& p, const T& at) {
    constexpr Window w = S.first_window;
    return address(p, w, at.image0, at.halo_y(), at.halo_x(), 0);
  }
  FCM_DEVICE static int halo_offset(const Params& p, int image, int y, int x) {
    constexpr Window w = S.first_window;
    return (image * p.in_h + y * w.stride_h) * p.in_w + x * w.stride_w;
  }
  FCM_DEVICE static const char* pixel_at(const char* corner, int offset) {
    return corner + (long long)offset * (S.c_in * L::kElement);
  }
  FCM_DEVICE static const char* output_pixel(const Params& p, const T& at, int py, int side) {
    constexpr Window w = S.project_window;
    const Pixel q = at.output_pixel(p, L::warp_m(), py, side);
    return q.valid ? address(p, w, q.n, q.y, q.x, 0) : nullptr;
  }
  // As load_group, of a pixel's first channel, and as it is.
  template <int DEPTH>
  FCM_DEVICE static Vec load_pixel(const char* pixel, int kg) {
    const int k = first_channel<DEPTH>(kg);
    Vec v{};
    if (k >= S.c_in) return v;
    if (half_share<DEPTH>(kg)) {
      const HalfVec h = *(const HalfVec*)(pixel + k * L::kElement);
      v.r[0] = h.r[0], v.r[1] = h.r[1];
    } else {
      v = *(const Vec*)(pixel + k * L::kElement);
    }
    return v;
  }
  // A reduction of an odd number of steps ends in half a group.
  template <int DEPTH>
  FCM_DEVICE static constexpr bool half_share(int kg) {
    constexpr int kSteps = ceil_div(DEPTH, L::kGroup / 2);
    return kSteps % 2 && kg == kSteps / 2;
  }
  template <int DEPTH>
  FCM_DEVICE static int first_channel(int kg) {
    return kg * L::kGroup + L::column() * (half_share<DEPTH>(kg) ? L::kLane / 2 : L::kLane);
  }

  FCM_DEVICE static const char* address(const Params& p, const Window& w, int n, int y, int x, int k) {
    const long long pixel = ((long long)n * p.in_h + y * w.stride_h) * p.in_w + x * w.stride_w;
    return (const char*)p.x + (pixel * S.c_in + k) * L::kElement;
  }

  // The same channels of the groups of a reduction of DEPTH, for a fragment: group `kg`, this lane's share.
  template <Dense KIND, int DEPTH>
  FCM_DEVICE static Vec load_group(const Params& p, const Window& w, int n, int y, int x, int kg, bool valid) {
    if (half_share<DEPTH>(kg)) return load<KIND, L::kLane / 2>(p, w, n, y, x, first_channel<DEPTH>(kg), valid);
    return load<KIND, L::kLane>(p, w, n, y, x, first_channel<DEPTH>(kg), valid);
  }
};

}  // namespace fcm
