// The end of a module: bias and activation of the last stage, residual, output activation, and the store to Y.
#pragma once

#include "tile.cuh"

namespace fcm {

template <class C>
struct Output {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;

  FCM_DEVICE static long long index(const Params& p, const Pixel& q, int c) {
    if constexpr (S.output_nchw) return (((long long)q.n * S.c_out + c) * p.out_h + q.y) * p.out_w + q.x;
    return (((long long)q.n * p.out_h + q.y) * p.out_w + q.x) * S.c_out + c;
  }
  FCM_DEVICE static float residual(const Params& p, long long i) {
    if constexpr (L::kHalf) return half_float(((const unsigned short*)p.residual)[i]);
    return ((const float*)p.residual)[i];
  }

  // Stores `COUNT` channels of pixel `q` from channel c on; `x` is what the last stage's activation gave.
  template <int COUNT>
  FCM_DEVICE static void store(const Params& p, const Pixel& q, int c, float (&x)[COUNT]) {
    if (!q.valid || c >= S.c_out) return;
    constexpr bool kVector = !S.output_nchw && S.c_out % COUNT == 0;
    constexpr int kWords = COUNT * L::kElement / 4;
    const long long at = index(p, q, c);
    const long long step = S.output_nchw ? (long long)p.out_h * p.out_w : 1;
    if constexpr (S.residual) {
      if constexpr (kVector) {
        u32 r[kWords];
        load_words<kWords>(r, (const char*)p.residual + at * L::kElement);
        FCM_UNROLL
        for (int i = 0; i < COUNT; ++i) {
          if constexpr (L::kHalf)
            x[i] += i % 2 ? half2_high(r[i / 2]) : half2_low(r[i / 2]);
          else
            x[i] += bits_float(r[i]);
        }
      } else {
        FCM_UNROLL
        for (int i = 0; i < COUNT; ++i)
          if (c + i < S.c_out) x[i] += residual(p, at + i * step);
      }
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i) x[i] = activate<L::kHalf>(S.output_act, x[i], 0.f);
    }
    if constexpr (kVector) {
      u32 r[kWords];
      FCM_UNROLL
      for (int i = 0; i < kWords; ++i) {
        if constexpr (L::kHalf)
          r[i] = half2_pack(x[2 * i], x[2 * i + 1]);
        else
          r[i] = float_bits(x[i]);
      }
      store_words<kWords>((char*)p.y + at * L::kElement, r);
    } else {
      FCM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        if (c + i >= S.c_out) continue;
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
      load_words<kWords>(r, (const char*)(from + i));
      FCM_UNROLL
      for (int j = 0; j < kWords; ++j) v[i + j] = bits_float(r[j]);
    }
  }
  template <int WORDS>
  FCM_DEVICE static void load_words(u32 (&r)[WORDS], const char* from) {
    if constexpr (WORDS == 4) {
      const Vec v = *(const Vec*)from;
      FCM_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = v.r[i];
    } else {
      static_assert(WORDS == 2, "a lane has 16 or 8 bytes of a pixel");
      const HalfVec v = *(const HalfVec*)from;
      r[0] = v.r[0], r[1] = v.r[1];
    }
  }
  template <int WORDS>
  FCM_DEVICE static void store_words(char* to, const u32 (&r)[WORDS]) {
    if constexpr (WORDS == 4)
      *(Vec*)to = Vec{{r[0], r[1], r[2], r[3]}};
    else
      *(HalfVec*)to = HalfVec{{r[0], r[1]}};
  }

  // A group of a depthwise that ends the module.
  FCM_DEVICE static void store_vector(const Params& p, const Pixel& q, int c, const Vec& v) {
    float x[L::kLane];
    L::unpack(x, v);
    store<L::kLane>(p, q, c, x);
  }

  // A group of products: `base` is the group's first channel, `side` the pixel. TAIL: half a group. x: this lane's
  // channels, from `first` on.
  template <bool TAIL>
  static constexpr int kCount = TAIL ? L::kLane / 2 : L::kLane;
  template <bool TAIL>
  FCM_DEVICE static void store_products(const Params& p, const Pixel& q, int first, int side,
                                        const float (&c)[L::kBlocks8][4], float (&x)[kCount<TAIL>]) {
    constexpr int kCount = Output::kCount<TAIL>;
    constexpr Act act = S.project_act;
    float bias[kCount], slope[kCount] = {};
    load_vector(bias, p.project_bias + first);
    if constexpr (act.kind == Activation::prelu) load_vector(slope, p.project_slope + first);
    FCM_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = activate<L::kHalf>(act, c[i / 2][2 * side + i % 2] + bias[i], slope[i]);
    store<kCount>(p, q, first, x);
  }
  // Of two pixels; then calls pool(x, first) if sums of Y are asked for.
  template <bool TAIL, class Pool>
  FCM_DEVICE static void store_pixels(const Params& p, const Pixel (&q)[2], int base, const float (&c)[L::kBlocks8][4],
                                      Pool pool) {
    const int first = base + L::column() * kCount<TAIL>;
    float x[2][kCount<TAIL>];
    FCM_UNROLL
    for (int side = 0; side < 2; ++side) store_products<TAIL>(p, q[side], first, side, c, x[side]);
    if constexpr (S.pool) pool(x, first);
  }
  template <class Pool>
  FCM_DEVICE static void store_group(const Params& p, const Pixel (&q)[2], int base, const float (&c)[L::kBlocks8][4],
                                     Pool pool) {
    if (base >= padded_out(S)) return;
    if (padded_out(S) % L::kGroup && base + L::kGroup > padded_out(S))
      store_pixels<true>(p, q, base, c, pool);
    else
      store_pixels<false>(p, q, base, c, pool);
  }
};

}  // namespace fcm
