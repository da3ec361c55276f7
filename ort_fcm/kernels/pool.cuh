// Sums of a depthwise's output over the map: each warp adds up its own pixels and writes one row, so that nothing waits
// and the bits never change; whoever reads the rows adds them up in their order. A row is scaled such that the mean of
// all rows is the mean over the map, which keeps it in the range of the type.
#pragma once

#include "tile.cuh"

namespace fcm {

template <class C>
struct Pool {
  using L = Lanes<C>;
  using T = TilePlace<C>;
  static constexpr Spec S = C::spec;
  static constexpr int P = S.tile.patch_h;

  // Of what all lanes hold at `i`, this lane's sum over its channels' eight rows of lanes: on return sum[0] is that of
  // channel number `row` of kLane (in float, of number row / 2).
  template <int COUNT, int MASK>
  FCM_DEVICE static void add_rows(float* sum) {
    if constexpr (COUNT > 1) {
      const bool upper = L::lane() & MASK;
      FCM_UNROLL
      for (int i = 0; i < COUNT / 2; ++i) {
        const float keep = upper ? sum[i + COUNT / 2] : sum[i], give = upper ? sum[i] : sum[i + COUNT / 2];
        sum[i] = keep + shuffle_xor(give, MASK);
      }
    } else {
      sum[0] += shuffle_xor(sum[0], MASK);
    }
    if constexpr (MASK > 4) add_rows<(COUNT > 1 ? COUNT / 2 : 1), MASK / 2>(sum);
  }

  // Writes the sums of a group: `d` are this warp's pixels as they are stored, c this lane's first channel.
  FCM_DEVICE static void store(const Params& p, const T& place, const Vec (&d)[P][2], int c) {
    float sum[L::kLane] = {};
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int side = 0; side < 2; ++side) {
        if (!place.output_pixel(p, L::warp_m(), py, side).valid) continue;
        FCM_UNROLL
        for (int i = 0; i < L::kLane; ++i) {
          const u32 r = d[py][side].r[L::kHalf ? i / 2 : i];
          sum[i] += !L::kHalf ? bits_float(r) : i % 2 ? half2_high(r) : half2_low(r);
        }
      }
    }
    add_rows<L::kLane, 16>(sum);
    constexpr int kSplit = 8 / L::kLane;  // lanes that hold the same sum
    const int channel = c + L::row() / kSplit;
    const int image = S.tile.images > 1 ? L::warp_m() / pool_warps(S) : 0;
    const int warp = S.tile.images > 1 ? L::warp_m() % pool_warps(S) : L::warp_m();
    if (warp >= pool_warps(S) || image >= place.images || channel >= S.c_out || L::row() % kSplit) return;
    const int in_image = place.y0 / S.tile.tile_h * p.tiles_x + place.x0 / S.tile.tile_w;
    const long long row = (long long)(place.image0 + image) * p.pool_rows + in_image * pool_warps(S) + warp;
    const float mean = sum[0] * ((float)p.pool_rows / ((float)p.out_h * (float)p.out_w));
    if constexpr (L::kHalf)
      ((unsigned short*)p.pool)[row * S.c_out + channel] = (unsigned short)(half2_pack(mean, 0.f) & 0xffff);
    else
      ((float*)p.pool)[row * S.c_out + channel] = mean;
  }
};

}  // namespace fcm
