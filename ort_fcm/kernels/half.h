// Half precision on the CPU: conversions with round to nearest even, infinities, NaN and subnormals. Host only.
#pragma once

#include <cstdint>
#include <cstring>

namespace fcm {

inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = (std::uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ffu;
  std::uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float f = (float)mantissa * (1.f / 16777216);  // 2^-24
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline std::uint16_t float_to_half(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const std::uint16_t sign = (std::uint16_t)(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more; less than that rounds below
  if (bits < 0x38800000u) {                        // subnormal: the float adder rounds at 2^-24 when 0.5 is added
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | (std::uint16_t)(bits - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1);  // to nearest, ties to even; a carry moves into the exponent as it should
  return sign | (std::uint16_t)((bits - 0x38000000u) >> 13);
}

// To TF32's 10 bits of mantissa, ties away from zero, as cvt.rna does.
inline float round_to_tf32(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&f, &bits, 4);
  return f;
}

}  // namespace fcm
