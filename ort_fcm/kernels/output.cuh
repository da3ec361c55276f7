// The end of a module: bias and activation of the last stage, residual, output activation, and the store to Y.
#pragma once

#include "tile.cuh"

namespace fcm {

template <class C>
struct Output {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;

  using T = TilePlace<C>;

  // Where a pixel of Y starts: the element of its first channel.
  struct Place {
    long long at;
    bool valid;
  };
  FCM_DEVICE static Place find(const Params& p, const T& tile, int warp_m, int py, int side) {
    if constexpr (!S.depthwise && !S.output_nchw) {
      return {tile.flat_pixel(warp_m, py, side) * S.c_out, tile.flat_exists(p, warp_m, py, side)};
    } else {
      const Pixel q = tile.output_pixel(p, warp_m, py, side);
      return {place(p, q.n, q.y, q.x), q.valid};
    }
  }
  FCM_DEVICE static long long place(const Params& p, int n, int y, int x) {
    const int in_image = (y * p.out_w + x) * (S.output_nchw ? 1 : S.c_out);  // an image has fewer than 2^30 elements
    return (long long)n * (p.out_h * p.out_w * S.c_out) + in_image;
  }
  FCM_DEVICE static float residual(const Params& p, long long i) {
    if constexpr (L::kHalf) return half_float(((const unsigned short*)p.residual)[i]);
    return ((const float*)p.residual)[i];
  }

  // Whether a lane's `count` channels are one vector in Y.
  static constexpr bool vectors(int count) { return !S.output_nchw && S.c_out % count == 0; }

  // This lane's residual of a pixel, from channel c on, where Y is stored in vectors. Without a branch, and by itself,
  // so that several can be asked for before the first is waited for: no load may pass a store.
  template <int COUNT>
  FCM_DEVICE static void load_residual(const Params& p, const Place& q, int c, u32 (&r)[COUNT * L::kElement / 4]) {
    if constexpr (S.residual && vectors(COUNT)) {
      const long long at = q.valid && c < S.c_out ? q.at + c : 0;
      load_words(r, (const char*)p.residual + at * L::kElement);
    }
  }

  // Stores `COUNT` channels of pixel `q` from channel c on; `x` is what the last stage's activation gave, `r` what
  // load_residual gave.
  template <int COUNT>
  FCM_DEVICE static void store(const Params& p, const Place& q, int c, float (&x)[COUNT],
                               u32 (&r)[COUNT * L::kElement / 4]) {
    constexpr int kWords = COUNT * L::kElement / 4;
    const bool valid = q.valid && c < S.c_out;
    const long long step = S.output_nchw ? (long long)p.out_h * p.out_w : 1, at = q.at + c * step;
    if constexpr (S.residual) {
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        if constexpr (!vectors(COUNT))
          x[i] += valid && c + i < S.c_out ? residual(p, at + i * step) : 0.f;
        else if constexpr (L::kHalf)
          x[i] += i % 2 ? half2_high(r[i / 2]) : half2_low(r[i / 2]);
        else
          x[i] += bits_float(r[i]);
        x[i] = activate<L::kHalf>(S.output_act, x[i], 0.f);
      }
    }
    if constexpr (vectors(COUNT)) {
      FCM_UNROLL
      for (int i = 0; i < kWords; ++i) {
        if constexpr (L::kHalf)
          r[i] = half2_pack(x[2 * i], x[2 * i + 1]);
        else
          r[i] = float_bits(x[i]);
      }
      if (valid) store_away((char*)p.y + at * L::kElement, r);
    } else {
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        if (!valid || c + i >= S.c_out) continue;
        if constexpr (L::kHalf)
          ((unsigned short*)p.y)[at + i * step] = (unsigned short)(half2_pack(x[i], 0.f) & 0xffff);
        else
          ((float*)p.y)[at + i * step] = x[i];
      }
    }
  }

  template <int COUNT>
  FCM_DEVICE static void load_vector(float (&v)[COUNT], const float* from) {
    constexpr int kWords = COUNT % 4 ? 2 : 4;
    FCM_UNROLL
    for (int i = 0; i < COUNT; i += kWords) {
      u32 r[kWords];
      load_constants(r, from + i);
      FCM_UNROLL
      for (int j = 0; j < kWords; ++j) v[i + j] = bits_float(r[j]);
    }
  }
  FCM_DEVICE static void load_words(u32 (&r)[4], const char* from) {
    const Vec v = *(const Vec*)from;
    FCM_UNROLL
    for (int i = 0; i < 4; ++i) r[i] = v.r[i];
  }
  FCM_DEVICE static void load_words(u32 (&r)[2], const char* from) {
    const HalfVec v = *(const HalfVec*)from;
    r[0] = v.r[0], r[1] = v.r[1];
  }

  // A group of a depthwise that ends the module.
  static constexpr bool kWholeGroups = packed_groups(S) * L::kGroup == S.c_out;  // all that are computed are Y's
  FCM_DEVICE static void store_vector(const Params& p, const Place& q, int c, const Vec& v) {
    if constexpr (!S.residual && vectors(L::kLane)) {
      if (q.valid && (kWholeGroups || c < S.c_out)) store_away((char*)p.y + (q.at + c) * L::kElement, v.r);
    } else {
      float x[L::kLane];
      L::unpack(x, v);
      u32 r[4];
      load_residual<L::kLane>(p, q, c, r);
      store<L::kLane>(p, q, c, x, r);
    }
  }

  // What the store of COUNT groups from channel `base` to `end`, of two pixels, needs besides their products. Where the
  // last is half a group, lanes have half of their channels.
  template <int COUNT>
  struct Ahead {
    float bias[COUNT][L::kLane];
    u32 residual[COUNT][2][4];  // half of them then, too
  };
  template <int COUNT>
  FCM_DEVICE static Ahead<COUNT> load_ahead(const Params& p, const Place (&q)[2], int base, int end) {
    Ahead<COUNT> ahead;
    FCM_UNROLL
    for (int g = 0; g < COUNT; ++g) {
      const int first = base + g * L::kGroup,
                there = first < end ? first : 0;  // a group beyond stands in for the first
      const bool in_half = ends_in_half(there);
      const int c = there + L::column() * (in_half ? L::kLane / 2 : L::kLane);
      float some[L::kLane / 2];
      if (in_half) {
        load_vector(some, p.project_bias + c);
        FCM_UNROLL
        for (int i = 0; i < L::kLane / 2; ++i) ahead.bias[g][i] = some[i];
      } else {
        load_vector(ahead.bias[g], p.project_bias + c);
      }
      FCM_UNROLL
      for (int side = 0; side < 2; ++side) {
        if (in_half)
          load_residual<L::kLane / 2>(p, q[side], c, first_half(ahead.residual[g][side]));
        else
          load_residual<L::kLane>(p, q[side], c, ahead.residual[g][side]);
      }
    }
    return ahead;
  }
  // Stores the products of those of these groups that start in front of channel `end`. pool(x, first): is called, if
  // sums of Y are asked for, with this lane's channels of Y from `first` on, of both pixels.
  template <int COUNT, class Pool>
  FCM_DEVICE static void store_groups(const Params& p, const Place (&q)[2], int base, int end,
                                      const float (&c)[COUNT][L::kBlocks8][4], Ahead<COUNT> ahead, Pool pool) {
    FCM_UNROLL
    for (int g = 0; g < COUNT; ++g) {
      const int first = base + g * L::kGroup;
      if (first >= end) continue;
      if (ends_in_half(first))
        store_pixels<L::kLane / 2>(p, q, first, c[g], ahead.bias[g], ahead.residual[g], pool);
      else
        store_pixels<L::kLane>(p, q, first, c[g], ahead.bias[g], ahead.residual[g], pool);
    }
  }
  FCM_DEVICE static bool ends_in_half(int base) {
    return padded_out(S) % L::kGroup && base + L::kGroup > padded_out(S);
  }
  FCM_DEVICE static u32 (&first_half(u32 (&r)[4]))[2] { return *(u32(*)[2])r; }
  template <int COUNT, class Pool>
  FCM_DEVICE static void store_pixels(const Params& p, const Place (&q)[2], int base, const float (&c)[L::kBlocks8][4],
                                      const float (&bias)[L::kLane], u32 (&r)[2][4], Pool pool) {
    constexpr Act act = S.project_act;
    const int first = base + L::column() * COUNT;
    float x[2][COUNT], slope[COUNT] = {};
    if constexpr (act.kind == Activation::prelu) load_vector(slope, p.project_slope + first);
    FCM_UNROLL
    for (int side = 0; side < 2; ++side) {
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i)
        x[side][i] = activate<L::kHalf>(act, c[i / 2][2 * side + i % 2] + bias[i], slope[i]);
      store<COUNT>(p, q[side], first, x[side], *(u32(*)[COUNT * L::kElement / 4]) r[side]);
    }
    if constexpr (S.pool) pool(x, first);
  }
};

}  // namespace fcm
