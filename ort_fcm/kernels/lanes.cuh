// How channels lie over lanes. Lane 4 * g + t of a warp holds pixels g and g + 8 of a 16-pixel tile, and of each group
// of channels the 16 bytes that start at t * lane_channels(). Reductions do not care for order and pack.h permutes the
// weights to match, so that the same 16 bytes are a load, a store, the result of one tensor-core product and the
// operand of the next. Where a dimension ends in half a group, a lane has 8 bytes.
#pragma once

#include "activation.cuh"

namespace fcm {

template <class C>
struct Lanes {
  static constexpr Spec S = C::spec;
  static constexpr bool kHalf = S.type == Type::float16;
  static constexpr int kGroup = group(S.type), kLane = lane_channels(S.type);
  static constexpr int kElement = element_bytes(S.type);
  static constexpr int kBlocks8 = kGroup / 8;  // 8-channel products of a group

  FCM_DEVICE static int lane() { return thread_index() % 32; }
  FCM_DEVICE static int row() { return lane() / 4; }     // g
  FCM_DEVICE static int column() { return lane() % 4; }  // t
  FCM_DEVICE static int warp_m() { return thread_index() / 32 % S.tile.warps_m; }
  FCM_DEVICE static int warp_n() { return thread_index() / 32 / S.tile.warps_m; }
  FCM_DEVICE static int warp() { return thread_index() / 32; }

  // What a product reads of pixels g and g + 8: of each of a group's two steps, the registers in its order.
  struct Operand {
    Vec step[2];
  };
  FCM_DEVICE static Operand operands(const Vec& v0, const Vec& v1) {
    return {{Vec{{v0.r[0], v1.r[0], v0.r[1], v1.r[1]}}, Vec{{v0.r[2], v1.r[2], v0.r[3], v1.r[3]}}}};
  }

  // c += a * b over STEPS of a group: b are the weights of 8 channels.
  template <int STEPS>
  FCM_DEVICE static void multiply(float (&c)[4], const Operand& operand, const Vec& b) {
    FCM_UNROLL
    for (int s = 0; s < STEPS; ++s) {
      const u32(&a)[4] = operand.step[s].r;
      const u32 w[2] = {b.r[2 * s], b.r[2 * s + 1]};
      if constexpr (kHalf) {
        mma_half(c, c, a[0], a[1], a[2], a[3], w[0], w[1]);
      } else if constexpr (S.type == Type::tf32) {
        mma_tf32(c, c, a[0], a[1], a[2], a[3], w[0], w[1]);
      } else {  // float to nearly its own precision: the products of both operands' high and low parts, but low * low
        u32 ah[4], al[4], bh[2], bl[2];
        FCM_UNROLL
        for (int i = 0; i < 4; ++i) split(a[i], ah[i], al[i]);
        FCM_UNROLL
        for (int i = 0; i < 2; ++i) split(w[i], bh[i], bl[i]);
        mma_tf32(c, c, al[0], al[1], al[2], al[3], bh[0], bh[1]);
        mma_tf32(c, c, ah[0], ah[1], ah[2], ah[3], bl[0], bl[1]);
        mma_tf32(c, c, ah[0], ah[1], ah[2], ah[3], bh[0], bh[1]);
      }
    }
  }
  FCM_DEVICE static void split(u32 x, u32& high, u32& low) {
    high = round_tf32(bits_float(x)) & ~0x1fffu;  // what products read of it
    low = round_tf32(bits_float(x) - bits_float(high));
  }

  FCM_DEVICE static void unpack(float (&to)[kLane], const Vec& v) {
    FCM_UNROLL
    for (int i = 0; i < kLane; ++i) {
      if constexpr (kHalf)
        to[i] = i % 2 ? half2_high(v.r[i / 2]) : half2_low(v.r[i / 2]);
      else
        to[i] = bits_float(v.r[i]);
    }
  }

  FCM_DEVICE static void put(void* to, float x) {
    if constexpr (kHalf)
      *(unsigned short*)to = (unsigned short)(half2_pack(x, 0.f) & 0xffff);
    else
      *(float*)to = x;
  }

  // What a tensor-core product may read.
  FCM_DEVICE static Vec operand(Vec v) {
    if constexpr (S.type == Type::tf32) {
      FCM_UNROLL
      for (int i = 0; i < 4; ++i) v.r[i] = round_tf32(bits_float(v.r[i]));
    }
    return v;
  }

  // The weights of one 8-channel product, from shared memory.
  template <int STEPS>
  FCM_DEVICE static Vec weights(const char* product) {
    Vec b{};
    if constexpr (STEPS == 2) {
      b = *(const Vec*)(product + lane() * 16);
    } else {
      const HalfVec h = *(const HalfVec*)(product + lane() * 8);
      b.r[0] = h.r[0], b.r[1] = h.r[1];
    }
    return b;
  }

  // The channels that this lane has of one pixel (side 0: g, 1: g + 8) in the results of a group's products.
  FCM_DEVICE static Vec pack(const float (&c)[kBlocks8][4], int side, Act act, const float* slope) {
    Vec v;
    FCM_UNROLL
    for (int j = 0; j < kBlocks8; ++j) {
      const float x = c[j][2 * side], y = c[j][2 * side + 1];
      const float slope_x = act.kind == Activation::prelu ? slope[2 * j] : 0.f;
      const float slope_y = act.kind == Activation::prelu ? slope[2 * j + 1] : 0.f;
      if constexpr (kHalf) {
        v.r[j] = activate_pack(act, x, y, slope_x, slope_y);
      } else {
        v.r[2 * j] = float_bits(activate(act, x, slope_x));
        v.r[2 * j + 1] = float_bits(activate(act, y, slope_y));
      }
    }
    return v;
  }

  // Starts a group's products at the bias; `bias` points at this lane's channels.
  FCM_DEVICE static void start(float (&c)[kBlocks8][4], const float* bias) {
    FCM_UNROLL
    for (int j = 0; j < kBlocks8; ++j) {
      c[j][0] = c[j][2] = bias[2 * j];
      c[j][1] = c[j][3] = bias[2 * j + 1];
    }
  }
};

}  // namespace fcm
