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
  FCM_DEVICE static void store(const Params& p, const T& place, int m, int py, const float (&x)[2][COUNT], int c) {
    float sum[COUNT] = {};
    add(sum, x, place.output_pixel(p, m, py, 0).valid, place.output_pixel(p, m, py, 1).valid);
    write<COUNT>(p, place, m, py, sum, c);
  }

  // Without a depthwise, the 16 may be of several images: the first's image, and where that starts, counted from them
  // on (0 or less). All in numbers below 2^31: a division of more bits is a hundred instructions.
  struct Flat {
    int image, start;
  };
  FCM_DEVICE static Flat find(const Params& p, const T& place, int m, int py) {
    const u32 area = p.out_h * p.out_w, at = place.in_image + (m * P + py) * 16, images = at / area;
    return {place.image0 + (int)images, (int)(images * area - at)};
  }
  template <int COUNT>
  FCM_DEVICE static void store(const Params& p, const T& place, const Flat& first, const float (&x)[2][COUNT], int c) {
    const int area = p.out_h * p.out_w, pixel = L::row();
    for (int n = first.image, start = first.start; n < p.batch && start < 16; ++n, start += area) {
      const int end = start + area;
      float sum[COUNT] = {};
      add(sum, x, pixel >= start && pixel < end, pixel + 8 >= start && pixel + 8 < end);
      int row = start < 0 ? (15 - start) / 16 : 0;
      write_row<COUNT>(p, place, sum, n, row, c, true);
      if (end > 16) break;
      while (++row < p.pool_rows) put<COUNT>(p, place, 0.f, n, row, c);  // the image ends here, but others touch more
    }
  }

 private:
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
    write_row<COUNT>(p, place, sum, place.image0 + image, row, c, warp < pool_warps(S) && image < place.images);
  }
  template <int COUNT>
  FCM_DEVICE static void write_row(const Params& p, const T& place, float (&sum)[COUNT], int image, int row, int c,
                                   bool there) {
    add_rows<COUNT, 16>(sum);
    if (there) put<COUNT>(p, place, sum[0], image, row, c);
  }
  template <int COUNT>
  FCM_DEVICE static void put(const Params& p, const T& place, float sum, int image, int row, int c) {
    constexpr int kSplit = 8 / COUNT;  // lanes that hold the same sum
    const int channel = c + L::row() / kSplit;
    if (channel >= S.c_out || L::row() % kSplit) return;
    L::put((char*)p.pool + (((long long)image * p.pool_rows + row) * S.c_out + channel) * L::kElement,
           sum * place.row_scale);
  }
};

}  // namespace fcm
