// Sums of Y over the map: each warp adds up its own pixels and writes one row (behind a project, one for every 16 of
// them), so that nothing waits and the bits never change; whoever reads the rows adds them up in their order. A row is
// scaled such that the mean of all rows is the mean over the map, which keeps it in the range of the type.
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
    write<L::kLane>(p, place, L::warp_m(), 0, sum, c);
  }

  // The same of 16 pixels behind a project: patch row `py` of warp `m`. x[side] are this lane's channels from c on of
  // pixel `side` of its two.
  template <int COUNT>
  FCM_DEVICE static void store(const Params& p, const T& place, int m, int py, const Pixel (&q)[2],
                               const float (&x)[2][COUNT], int c) {
    if constexpr (S.depthwise) {
      float sum[COUNT] = {};
      add(sum, x, q[0].valid, q[1].valid);
      write<COUNT>(p, place, m, py, sum, c);
    } else {
      const long long first = place.pixel0 + (m * P + py) * 16;
      const int area = p.out_h * p.out_w;
      for (int n = (int)min(first / area, p.batch); n < p.batch && (long long)n * area < first + 16; ++n) {
        float sum[COUNT] = {};
        add(sum, x, q[0].valid && q[0].n == n, q[1].valid && q[1].n == n);
        int row = (int)(first / 16 - (long long)n * area / 16);
        write_row<COUNT>(p, sum, n, row, c, true);
        if ((n + 1LL) * area > first + 16) continue;
        while (++row < p.pool_rows) {  // the image ends here, but others touch more
          float none[COUNT] = {};
          write_row<COUNT>(p, none, n, row, c, true);
        }
      }
    }
  }

 private:
  FCM_DEVICE static long long min(long long a, long long b) { return a < b ? a : b; }

  template <int COUNT>
  FCM_DEVICE static void add(float (&sum)[COUNT], const float (&x)[2][COUNT], bool first, bool second) {
    FCM_UNROLL
    for (int i = 0; i < COUNT; ++i) sum[i] = (first ? x[0][i] : 0.f) + (second ? x[1][i] : 0.f);
  }
  // Of a tile's warp and patch row.
  template <int COUNT>
  FCM_DEVICE static void write(const Params& p, const T& place, int m, int py, float (&sum)[COUNT], int c) {
    const int image = S.tile.images > 1 ? m / pool_warps(S) : 0, warp = S.tile.images > 1 ? m % pool_warps(S) : m;
    const int in_image = place.y0 / S.tile.tile_h * p.tiles_x + place.x0 / S.tile.tile_w;
    const int row = in_image * tile_pool_rows(S) + (has_project(S) ? warp * P + py : warp);
    write_row<COUNT>(p, sum, place.image0 + image, row, c, warp < pool_warps(S) && image < place.images);
  }
  template <int COUNT>
  FCM_DEVICE static void write_row(const Params& p, float (&sum)[COUNT], int image, int row, int c, bool there) {
    add_rows<COUNT, 16>(sum);
    constexpr int kSplit = 8 / COUNT;  // lanes that hold the same sum
    const int channel = c + L::row() / kSplit;
    if (!there || channel >= S.c_out || L::row() % kSplit) return;
    const float mean = sum[0] * ((float)p.pool_rows / ((float)p.out_h * (float)p.out_w));
    L::put((char*)p.pool + (((long long)image * p.pool_rows + row) * S.c_out + channel) * L::kElement, mean);
  }
};

}  // namespace fcm
