// The depthwise stage: a thread computes its patch of patch_h x 2 pixels for its channels of one group, from the halo
// region in shared memory. Half precision multiplies and adds in packed half (two channels an instruction).
#pragma once

#include "tile.cuh"

namespace fcm {

template <class C>
struct Depthwise {
  using L = Lanes<C>;
  using T = TilePlace<C>;
  static constexpr Spec S = C::spec;
  static constexpr Window W = S.depthwise_window;
  static constexpr int P = S.tile.patch_h;
  static constexpr int kRows = halo(P, W.kernel_h, W.stride_h, W.dilation_h);
  static constexpr int kColumns = halo(2, W.kernel_w, W.stride_w, W.dilation_w);
  static constexpr bool kRectifies = L::kHalf && starts_with_relu(S.depthwise_act);

  // Filter row that input row `r` of the patch meets at output row `py`, or -1; the same holds along columns.
  static constexpr int tap(int r, int py, int stride, int dilation, int kernel) {
    const int d = r - py * stride;
    return d >= 0 && d % dilation == 0 && d / dilation < kernel ? d / dilation : -1;
  }

  // `halo` is a group's plane of the middle tensor at this lane's patch and channels with even columns as `side` says,
  // `weights` the group's taps and `bias`, `slope` the group's vectors at this lane's channels. Sums over the map need
  // all results, valid or not: then nothing but a branch that is `never` taken keeps the loads of all rows apart.
  FCM_DEVICE static void run(Vec (&out)[P][2], const char* halo, int side, const char* weights, const float* bias,
                             const float* slope, [[maybe_unused]] bool never) {
    const char* base[2] = {halo + side * 64, halo + (side ^ 1) * 64};
    Vec sum[P][2];
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[py][0].r[i] = L::kHalf ? half2_pack(bias[2 * i], bias[2 * i + 1]) : float_bits(bias[i]);
        sum[py][1].r[i] = sum[py][0].r[i];
      }
    }
    FCM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (S.pool)
        if (never) break;
      FCM_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        bool used = false;
        FCM_UNROLL
        for (int py = 0; py < P; ++py) used |= tap(r, py, W.stride_h, W.dilation_h, W.kernel_h) >= 0;
        used &= tap(column, 0, W.stride_w, W.dilation_w, W.kernel_w) >= 0 ||
                tap(column, 1, W.stride_w, W.dilation_w, W.kernel_w) >= 0;
        if (!used) continue;
        const int place = (column ^ (column >> T::kShift)) & 1;
        const Vec v = *(const Vec*)(base[place] + r * (T::kPitch * 64) + column / 2 * 128);
        FCM_UNROLL
        for (int py = 0; py < P; ++py) {
          FCM_UNROLL
          for (int px = 0; px < 2; ++px) {
            const int ky = tap(r, py, W.stride_h, W.dilation_h, W.kernel_h);
            const int kx = tap(column, px, W.stride_w, W.dilation_w, W.kernel_w);
            if (ky < 0 || kx < 0) continue;
            const Vec w = *(const Vec*)(weights + (ky * W.kernel_w + kx) * depthwise_tap_bytes(S));
            FCM_UNROLL
            for (int i = 0; i < 4; ++i) {
              u32& s = sum[py][px].r[i];
              if constexpr (!L::kHalf)
                s = float_bits(bits_float(v.r[i]) * bits_float(w.r[i]) + bits_float(s));
              else if (kRectifies && ky == W.kernel_h - 1 && kx == W.kernel_w - 1)  // the last tap
                s = half2_fma_relu(v.r[i], w.r[i], s);
              else
                s = half2_fma(v.r[i], w.r[i], s);
            }
          }
        }
      }
    }
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int px = 0; px < 2; ++px) out[py][px] = finish<kRectifies>(sum[py][px], slope);
    }
  }

  // The activation of sums, words of channels as a Vec has them. RECTIFIED: max(x, 0) is done.
  template <bool RECTIFIED, class Words>
  FCM_DEVICE static Words finish(const Words& sum, const float* slope) {
    constexpr Act act = S.depthwise_act;
    constexpr bool kSlope = act.kind == Activation::prelu;
    Words v;
    FCM_UNROLL
    for (int i = 0; i < (int)(sizeof(Words) / 4); ++i) {
      if constexpr (!L::kHalf) {
        v.r[i] = float_bits(activate(act, bits_float(sum.r[i]), kSlope ? slope[i] : 0.f));
      } else if constexpr (packs(act.kind)) {
        v.r[i] = activate_half2<RECTIFIED>(act, sum.r[i]);
      } else {
        v.r[i] = activate_pack(act, half2_low(sum.r[i]), half2_high(sum.r[i]), kSlope ? slope[2 * i] : 0.f,
                               kSlope ? slope[2 * i + 1] : 0.f);
      }
    }
    return v;
  }
};

}  // namespace fcm
