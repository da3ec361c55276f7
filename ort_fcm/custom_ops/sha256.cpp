#include "sha256.h"

#include <cmath>
#include <cstdint>

namespace fcm {
namespace {

uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

// The standard takes its constants from roots of the first primes: the first 32 bits of their fractions.
struct Constants {
  uint32_t start[8], round[64];
  Constants() {
    int count = 0;
    for (int n = 2; count < 64; ++n) {
      bool prime = true;
      for (int d = 2; d * d <= n; ++d) prime = prime && n % d;
      if (!prime) continue;
      if (count < 8) start[count] = fraction(std::sqrt(static_cast<long double>(n)));
      round[count++] = fraction(std::cbrt(static_cast<long double>(n)));
    }
  }
  static uint32_t fraction(long double x) { return uint32_t((x - std::floor(x)) * 4294967296.0L); }
};

void add_block(const unsigned char* block, uint32_t* state, const uint32_t* constants) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
  }
  uint32_t s[8];
  for (int i = 0; i < 8; ++i) s[i] = state[i];
  for (int i = 0; i < 64; ++i) {
    const uint32_t a = s[0], e = s[4];
    const uint32_t first =
        s[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + constants[i] + w[i];
    const uint32_t second = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    for (int j = 7; j > 0; --j) s[j] = s[j - 1];
    s[4] += first;
    s[0] = first + second;
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

}  // namespace

std::string sha256(const std::string& data) {
  static const Constants constants;
  uint32_t state[8];
  for (int i = 0; i < 8; ++i) state[i] = constants.start[i];
  std::string padded = data + char(0x80);
  padded.append((120 - padded.size() % 64) % 64, '\0');
  for (int shift = 56; shift >= 0; shift -= 8) padded += char(uint64_t(data.size()) * 8 >> shift & 0xff);
  for (size_t i = 0; i < padded.size(); i += 64)
    add_block(reinterpret_cast<const unsigned char*>(padded.data()) + i, state, constants.round);
  std::string hex;
  for (uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  return hex;
}

}  // namespace fcm
