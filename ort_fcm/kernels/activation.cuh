// Activations, on floats and on channels as they lie in a register: two halves or one float. A new activation is a case
// of activate(), beside its name in spec.h.
#pragma once

#include "primitives.cuh"
#include "spec.h"

namespace fcm {

FCM_DEVICE float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp2(-1.44269504f * x)); }

// Within 4e-6 of x / 2 * (1 + erf(x / sqrt(2))), in a third of the instructions: x * sigmoid(a polynomial of x), which
// grows with x everywhere.
FCM_DEVICE float rough_gelu(float x) {
  const float u = x * x;
  const float q = (((-3.22898927e-6f * u + 8.82381428e-5f) * u + 3.60274513e-4f) * u - 0.105226688f) * u - 2.30204535f;
  return x * fast_reciprocal(1.f + fast_exp2(x * q));
}

// HALF: the result will be rounded to half precision.
template <bool HALF = false>
FCM_DEVICE float activate(Act act, float x, float slope) {
  switch (act.kind) {
    case Activation::none:
      return x;
    case Activation::relu:
      return maximum(x, 0.f);
    case Activation::clip:
      if (act.alpha == 0 && act.beta >= 0) return clip_to(act.beta, x);
      return minimum(maximum(x, act.alpha), act.beta);
    case Activation::hardswish:
      return x * minimum(maximum(x * (1.f / 6) + 0.5f, 0.f), 1.f);
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::hardsigmoid:
      return minimum(maximum(act.alpha * x + act.beta, 0.f), 1.f);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::gelu:
      return HALF ? rough_gelu(x) : 0.5f * x * (1.f + erf(x * 0.70710678f));
    case Activation::gelu_tanh:
      return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // 1 + tanh(y) = 2 * sigmoid(2 * y)
    case Activation::leakyrelu:
      return x < 0.f ? act.alpha * x : x;
    case Activation::prelu:
      return x < 0.f ? slope * x : x;
    case Activation::tanh:
      return tanh(x);
  }
  return x;
}

constexpr bool packs(Activation kind) {
  return kind == Activation::none || kind == Activation::relu || kind == Activation::clip;
}

// Whether the activation starts with max(x, 0), which some instructions do on their way.
constexpr bool starts_with_relu(Act act) {
  return act.kind == Activation::relu || (act.kind == Activation::clip && act.alpha == 0.f);
}

// Activation of two packed halves, without leaving half precision; only where packs(kind). RECTIFIED: max(x, 0) is
// done.
template <bool RECTIFIED = false>
FCM_DEVICE u32 activate_half2(Act act, u32 x) {
  if (act.kind == Activation::relu) return RECTIFIED ? x : half2_max(x, 0);
  if (act.kind != Activation::clip) return x;
  if (!RECTIFIED) x = half2_max(x, half2_pack(act.alpha, act.alpha));
  return half2_min(x, half2_pack(act.beta, act.beta));
}

// Activation of two neighbouring channels in float, result packed to half.
FCM_DEVICE u32 activate_pack(Act act, float low, float high, float slope_low, float slope_high) {
  if (starts_with_relu(act)) return activate_half2<true>(act, half2_pack_relu(low, high));
  if (packs(act.kind)) return activate_half2(act, half2_pack(low, high));
  return half2_pack(activate<true>(act, low, slope_low), activate<true>(act, high, slope_high));
}

}  // namespace fcm
