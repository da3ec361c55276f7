// Where a thread's pixels are. With a depthwise: the output tile in patches of patch_h x 2 pixels, eight to a warp, and
// the tile's halo region of the middle tensor in shared memory. Without: consecutive pixels.
#pragma once

#include "lanes.cuh"

namespace fcm {

struct Pixel {
  int n, y, x;
  bool valid;
};

template <class C>
struct TilePlace {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;
  static constexpr Window W = S.depthwise_window;
  static constexpr int kHaloH = S.depthwise ? halo_h(S) : 1, kPitch = S.depthwise ? halo_pitch(S) : 2;
  static constexpr int kPatchesX = patches_x(S) > 0 ? patches_x(S) : 1, kPatches = patches(S) > 0 ? patches(S) : 1;

  int image0, y0, x0;            // of the output tile
  int top, left, rows, columns;  // the part of the halo region that lies on the middle map, and its place in it
  int images;                    // images present
  long long pixel0;              // without a depthwise: the first of the flattened pixels
  int in_image;                  // for sums of Y: its place in its image, image0
  float row_scale;               // for sums of Y: what a row of them is multiplied by

  // A thread block that works through many tiles takes the same place of one image after another: what it has found out
  // about that place holds on. Others leave neighbours of an image to run together, which share what they read.
  static constexpr bool kImagesFirst = S.tile.resident;

  FCM_DEVICE TilePlace(const Params& p, int tile)
      : image0(0), y0(0), x0(0), top(0), left(0), rows(0), columns(0), images(0), pixel0(0), in_image(0), row_scale(0) {
    if (p.backward) tile = p.tiles - 1 - tile;
    if constexpr (S.pool) row_scale = (float)p.pool_rows / ((float)p.out_h * (float)p.out_w);
    if constexpr (S.depthwise) {
      const int tiles = p.tiles_x * p.tiles_y, groups = ceil_div(p.batch, S.tile.images);
      const int in_image = kImagesFirst ? tile / groups : tile % tiles;
      image0 = (kImagesFirst ? tile - in_image * groups : tile / tiles) * S.tile.images;
      y0 = in_image / p.tiles_x * S.tile.tile_h, x0 = in_image % p.tiles_x * S.tile.tile_w;
      images = images_from(p, image0);
      top = max(0, -halo_y()), left = max(0, -halo_x());
      rows = max(0, min(halo_h(S), p.mid_h - halo_y()) - top);
      columns = max(0, min(halo_w(S), p.mid_w - halo_x()) - left);
    } else {
      pixel0 = (long long)tile * flat_pixels(S);
      if constexpr (S.pool) {
        const long long area = (long long)p.out_h * p.out_w;
        image0 = (int)(pixel0 / area), in_image = (int)(pixel0 - image0 * area);
      }
    }
  }

  FCM_DEVICE static int images_from(const Params& p, int image0) {
    return S.tile.images > 1 ? min(S.tile.images, p.batch - image0) : 1;
  }

  // The tile `tile`, which comes after this one.
  FCM_DEVICE TilePlace next(const Params& p, int tile) const {
    if constexpr (S.depthwise && kImagesFirst) {
      TilePlace to = *this;
      to.image0 += p.backward ? -S.tile.images : S.tile.images;
      if (to.image0 >= 0 && to.image0 < p.batch) {
        to.images = images_from(p, to.image0);
        return to;
      }
    }
    return TilePlace(p, tile);
  }

  // Whether the valid part of the halo region is the same, so that what lies outside is zero already.
  FCM_DEVICE bool same_clip(const TilePlace& o) const {
    return top == o.top && left == o.left && rows == o.rows && columns == o.columns && images == o.images;
  }

  FCM_DEVICE bool same_place(const TilePlace& o) const { return y0 == o.y0 && x0 == o.x0 && images == o.images; }

  // The corner of the halo region on the middle map.
  FCM_DEVICE int halo_y() const { return y0 * W.stride_h - W.pad_top; }
  FCM_DEVICE int halo_x() const { return x0 * W.stride_w - W.pad_left; }
  FCM_DEVICE int halo_pixels() const { return images * rows * columns; }
  FCM_DEVICE bool crosses_border() const { return rows < halo_h(S) || columns < halo_w(S); }

  // i / n, of many i: exact below 2^20, since (i + 1/2) / n is at least 1/2n away from an integer.
  FCM_DEVICE static int divide(int i, int n) { return (int)((i + 0.5f) * (1.f / max(1, n))); }

  // The i-th valid pixel of the halo region: its coordinates on the middle map.
  FCM_DEVICE Pixel halo_pixel(int i) const {
    const int area = rows * columns, image = S.tile.images > 1 ? divide(i, area) : 0, rest = i - image * area;
    const int y = divide(rest, columns), x = rest - y * columns;
    const bool valid = i < halo_pixels();  // pixels that are not stand in for the first
    return {image0 + (valid ? image : 0), halo_y() + top + (valid ? y : 0), halo_x() + left + (valid ? x : 0), valid};
  }
  // Its byte offset in a halo plane; the last slot swallows what is not valid.
  FCM_DEVICE int halo_offset(const Pixel& q) const {
    if (!q.valid) return halo_plane_bytes(S) - 128;
    return halo_place(q.n - image0, q.y - halo_y(), q.x - halo_x());
  }
  FCM_DEVICE static int halo_place(int image, int y, int x) {
    return (image * kHaloH + y) * kPitch * 64 + x / 2 * 128 + halo_side(x) * 64;
  }

  // The inverse, of an offset that halo_offset gave; for what is not valid, the first pixel that is.
  FCM_DEVICE Pixel halo_pixel_at(int offset) const {
    const u32 slot = (u32)(offset >= halo_plane_bytes(S) - 128 ? halo_place(0, top, left) : offset) / 64;
    const u32 line = slot / kPitch, x = slot % kPitch;
    const int image = S.tile.images > 1 ? line / kHaloH : 0;
    return {image0 + image, halo_y() + (int)line - image * kHaloH, halo_x() + ((int)(x & ~1u) | halo_side(x)), true};
  }

  // Two neighbouring pixels share 128 bytes; which comes first alternates such that the patches of neighbouring lanes,
  // 2 * stride pixels apart, fall on different banks.
  static constexpr int kShift = W.stride_w == 1 ? 1 : W.stride_w == 2 ? 2 : 31;
  FCM_DEVICE static constexpr int halo_side(int x) { return (x ^ (x >> kShift)) & 1; }

  // The patch of lane row g of warp `m`, clamped to the tile.
  struct Patch {
    int image, y, x;
    bool valid;
  };
  FCM_DEVICE Patch patch(int m) const {
    const int q = m * 8 + L::row();
    const bool inside = q < S.tile.images * kPatches;
    const int r = inside ? q % kPatches : 0;
    return {inside ? q / kPatches : 0, r / kPatchesX * S.tile.patch_h, r % kPatchesX * 2, inside};
  }

  // Without a depthwise: the same pixel's place among all, and whether there is one.
  FCM_DEVICE static int flat_in_tile(int m, int py, int side) {
    return (m * S.tile.patch_h + py) * 16 + side * 8 + L::row();
  }
  FCM_DEVICE long long flat_pixel(int m, int py, int side) const { return pixel0 + flat_in_tile(m, py, side); }
  FCM_DEVICE bool flat_exists(const Params& p, int m, int py, int side) const {
    return flat_pixel(m, py, side) < (long long)p.out_h * p.out_w * p.batch &&
           (!S.mean || flat_in_tile(m, py, side) < flat_pixels(S));
  }

  // Output pixel `side` (0, 1) of row `py` of the patch of warp `m`.
  FCM_DEVICE Pixel output_pixel(const Params& p, int m, int py, int side) const {
    if constexpr (S.depthwise) {
      const Patch q = patch(m);
      const int y = y0 + q.y + py, x = x0 + q.x + side;
      return {image0 + q.image, y, x, q.valid && q.image < images && y < p.out_h && x < p.out_w};
    } else {
      const long long i = flat_pixel(m, py, side), area = (long long)p.out_h * p.out_w;
      const bool valid = flat_exists(p, m, py, side);
      const int image = valid ? (int)(i / area) : 0, rest = valid ? (int)(i - image * area) : 0;
      return {image, rest / p.out_w, rest % p.out_w, valid};
    }
  }
};

}  // namespace fcm
