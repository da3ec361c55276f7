// LayerNormalization of X over its channels, in front of a pointwise that has its scale and shift in weights and bias.
// A `first` has all channels of a pixel at hand before its products, and normalises them. A lone pointwise sees them
// pass by: it adds up x and x^2 with two products more, and scales its result; X's mean has no part in that, since
// weights are packed without their own.
#pragma once

#include "lanes.cuh"

namespace fcm {

// The sum over the four lanes that share a pixel.
FCM_DEVICE float add_columns(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Normalises pixels of `first`'s input.
template <class C>
struct Normalise {
  using L = Lanes<C>;
  using Operand = typename L::Operand;
  static constexpr Spec S = C::spec;
  static constexpr int kSteps = first_steps(S), kGroups = ceil_div(kSteps, 2);

  // This lane's i-th channel of a group, of pixel g (side 0) or g + 8.
  FCM_DEVICE static float value(const Operand& a, int side, int i) {
    const int word = L::kHalf ? i / 2 : i;
    const u32 r = a.step[word / 2].r[word % 2 * 2 + side];
    if constexpr (L::kHalf) return i % 2 ? half2_high(r) : half2_low(r);
    return bits_float(r);
  }
  // Whether this lane's i-th channel of group kg is one of X's.
  FCM_DEVICE static bool exists(int kg, int i) {
    const int share = kSteps % 2 && kg == kSteps / 2 && !S.tile.wgmma ? L::kLane / 2 : L::kLane;
    return i < share && kg * L::kGroup + L::column() * share + i < S.c_in;
  }

  // get(kg), an operand, and set(kg, vectors): group kg of PIXELS pixels, one or two.
  template <int PIXELS, class Get, class Set>
  FCM_DEVICE static void run(Get get, Set set) {
    float mean[PIXELS] = {}, scale[PIXELS] = {};
    FCM_UNROLL
    for (int kg = 0; kg < kGroups; ++kg) {
      const Operand a = get(kg);
      FCM_UNROLL
      for (int i = 0; i < PIXELS * L::kLane; ++i) mean[i % PIXELS] += value(a, i % PIXELS, i / PIXELS);
    }
    FCM_UNROLL
    for (int n = 0; n < PIXELS; ++n) mean[n] = add_columns(mean[n]) * (1.f / S.c_in);
    FCM_UNROLL
    for (int kg = 0; kg < kGroups; ++kg) {
      const Operand a = get(kg);
      FCM_UNROLL
      for (int i = 0; i < PIXELS * L::kLane; ++i) {
        const float x = exists(kg, i / PIXELS) ? value(a, i % PIXELS, i / PIXELS) - mean[i % PIXELS] : 0.f;
        scale[i % PIXELS] += x * x;
      }
    }
    FCM_UNROLL
    for (int n = 0; n < PIXELS; ++n)
      scale[n] = reciprocal_root(add_columns(scale[n]) * (1.f / S.c_in) + S.norm_epsilon);
    FCM_UNROLL
    for (int kg = 0; kg < kGroups; ++kg) {
      const Operand a = get(kg);
      Vec v[PIXELS];
      FCM_UNROLL
      for (int n = 0; n < PIXELS; ++n) {
        float x[L::kLane];
        FCM_UNROLL
        for (int i = 0; i < L::kLane; ++i) x[i] = exists(kg, i) ? (value(a, n, i) - mean[n]) * scale[n] : 0.f;
        FCM_UNROLL
        for (int i = 0; i < 4; ++i) {
          if constexpr (L::kHalf)
            v[n].r[i] = half2_pack(x[2 * i], x[2 * i + 1]);
          else
            v[n].r[i] = float_bits(x[i]);
        }
        v[n] = L::operand(v[n]);
      }
      set(kg, v);
    }
  }
};

// Sums of x and x^2 over the channels of 16 pixels.
template <class C>
struct Moments {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;

  float sums[4] = {}, squares[4] = {};  // products with ones; with the pixels themselves, of which the diagonal counts

  // A group of channels of pixels g and g + 8.
  FCM_DEVICE void add(const typename L::Operand& a) {
    constexpr u32 kOne = L::kHalf ? 0x3c003c00 : 0x3f800000;
    L::template multiply<2>(sums, a, Vec{{kOne, kOne, kOne, kOne}});
    FCM_UNROLL
    for (int side = 0; side < 2; ++side) {
      Vec own, v[2] = {};
      FCM_UNROLL
      for (int i = 0; i < 4; ++i) own.r[i] = a.step[i / 2].r[i % 2 * 2 + side];
      v[side] = own;
      L::template multiply<2>(squares, L::operands(v[0], v[1]), own);
    }
  }

  // {sum, sum of squares} of pixel g, then of pixel g + 8.
  FCM_DEVICE Vec gather() const {
    Vec v;
    FCM_UNROLL
    for (int side = 0; side < 2; ++side) {
      const float own = L::row() % 2 ? squares[2 * side + 1] : squares[2 * side];
      v.r[2 * side] = float_bits(sums[2 * side]);
      v.r[2 * side + 1] = float_bits(add_columns(L::row() / 2 == L::column() ? own : 0.f));
    }
    return v;
  }

  // What the products of a group of output channels become, given the sums of all channels.
  FCM_DEVICE static void scale(float (&c)[L::kBlocks8][4], const Vec& total) {
    FCM_UNROLL
    for (int side = 0; side < 2; ++side) {
      const float mean = bits_float(total.r[2 * side]) * (1.f / S.c_in);
      const float variance = bits_float(total.r[2 * side + 1]) * (1.f / S.c_in) - mean * mean;
      const float factor = reciprocal_root(maximum(variance, 0.f) + S.norm_epsilon);
      FCM_UNROLL
      for (int j = 0; j < L::kBlocks8; ++j) c[j][2 * side] *= factor, c[j][2 * side + 1] *= factor;
    }
  }
};

}  // namespace fcm
