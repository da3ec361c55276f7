// Runs a module's kernel on the CPU on random data and compares with a float64 reference.
#pragma once

#define FCM_CPU
#include <algorithm>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "module.cuh"
#include "pack.h"

namespace emulate {

using namespace fcm;

// A tensor of doubles that the module's element type represents exactly.
inline std::vector<double> draw(const Spec& s, std::size_t n, double scale, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<double> v(n);
  for (double& x : v) {
    const float f = (float)(normal(random) * scale);
    x = s.type == Type::float16 ? half_to_float(float_to_half(f)) : f;
  }
  return v;
}

inline double act(Act a, double x, double slope) {
  const auto clamp = [](double v, double lo, double hi) { return std::min(std::max(v, lo), hi); };
  switch (a.kind) {
    case Activation::none:
      return x;
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::clip:
      return clamp(x, a.alpha, a.beta);
    case Activation::hardswish:
      return x * clamp(x / 6 + 0.5, 0, 1);
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::hardsigmoid:
      return clamp(a.alpha * x + a.beta, 0, 1);
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::leakyrelu:
      return x < 0 ? a.alpha * x : x;
    case Activation::prelu:
      return x < 0 ? slope * x : x;
    case Activation::tanh:
      return std::tanh(x);
  }
  std::abort();
}

struct Map {  // NCHW
  int n, c, h, w;
  std::vector<double> v;
  double& at(int i, int j, int y, int x) { return v[(((std::size_t)i * c + j) * h + y) * w + x]; }
};

inline Map last_as_first(Map m) {
  const std::size_t image = m.v.size() / m.n;
  std::copy(m.v.begin(), m.v.begin() + image, m.v.end() - image);
  return m;
}

inline Map convolve(Map& in, int outputs, bool depthwise, const Window& w, const std::vector<double>& weight,
                    const std::vector<double>& bias, Act a, const std::vector<double>& slope) {
  Map out{in.n,
          outputs,
          (int)window_out(in.h, w.kernel_h, w.stride_h, w.dilation_h, w.pad_top, w.pad_bottom),
          (int)window_out(in.w, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left, w.pad_right),
          {}};
  out.v.resize((std::size_t)out.n * out.c * out.h * out.w);
  const int depth = depthwise ? 1 : in.c;
  for (int n = 0; n < out.n; ++n)
    for (int c = 0; c < outputs; ++c)
      for (int y = 0; y < out.h; ++y)
        for (int x = 0; x < out.w; ++x) {
          double sum = bias[c];
          for (int d = 0; d < depth; ++d)
            for (int ky = 0; ky < w.kernel_h; ++ky)
              for (int kx = 0; kx < w.kernel_w; ++kx) {
                const int sy = y * w.stride_h + ky * w.dilation_h - w.pad_top;
                const int sx = x * w.stride_w + kx * w.dilation_w - w.pad_left;
                if (sy < 0 || sx < 0 || sy >= in.h || sx >= in.w) continue;
                sum += in.at(n, depthwise ? c : d, sy, sx) *
                       weight[(((std::size_t)c * depth + d) * w.kernel_h + ky) * w.kernel_w + kx];
              }
          out.at(n, c, y, x) = act(a, sum, slope[c]);
        }
  return out;
}

struct Stage {
  std::vector<double> weight, bias, slope;
  std::vector<char> packed;
  std::vector<float> packed_bias, packed_slope;
};

template <class T>
std::vector<T> narrow(const std::vector<double>& v) {
  return std::vector<T>(v.begin(), v.end());
}

// Exactly the elements of a tensor in the module's type and layout, on the heap, so that ASan sees every step outside.
struct Tensor {
  std::vector<char> bytes;
  Tensor(const Spec& s, Map& m, bool nchw) : bytes(m.v.size() * element_bytes(s.type), (char)0xff) {
    for (int n = 0; n < m.n; ++n)
      for (int c = 0; c < m.c; ++c)
        for (int y = 0; y < m.h; ++y)
          for (int x = 0; x < m.w; ++x) put_element_raw(s, offset(m, n, c, y, x, nchw), (float)m.at(n, c, y, x));
  }
  static std::size_t offset(const Map& m, int n, int c, int y, int x, bool nchw) {
    return nchw ? (((std::size_t)n * m.c + c) * m.h + y) * m.w + x : (((std::size_t)n * m.h + y) * m.w + x) * m.c + c;
  }
  void put_element_raw(const Spec& s, std::size_t i, float f) {
    if (s.type == Type::float16) {
      const std::uint16_t h = float_to_half(f);
      std::memcpy(&bytes[i * 2], &h, 2);
    } else {
      std::memcpy(&bytes[i * 4], &f, 4);
    }
  }
  double get(const Spec& s, std::size_t i) const {
    if (s.type == Type::float16) {
      std::uint16_t h;
      std::memcpy(&h, &bytes[i * 2], 2);
      return half_to_float(h);
    }
    float f;
    std::memcpy(&f, &bytes[i * 4], 4);
    return f;
  }
  // Whether the last image has the bits of the first.
  bool repeats(const Spec& s, const Map& m, bool nchw) const {
    const int element = element_bytes(s.type);
    for (int c = 0; c < m.c; ++c)
      for (int y = 0; y < m.h; ++y)
        for (int x = 0; x < m.w; ++x)
          if (std::memcmp(&bytes[offset(m, 0, c, y, x, nchw) * element],
                          &bytes[offset(m, m.n - 1, c, y, x, nchw) * element], element))
            return false;
    return true;
  }
};

// The norm of the error over the norm of the reference; NaN if anything was not written, infinity if the last image, a
// copy of the first, has other bits.
template <class C>
double run(int batch, int height, int width, unsigned seed) {
  constexpr Spec s = C::spec;
  static_assert(illegal(s) == nullptr);
  std::mt19937 random(seed);
  Map x =
      last_as_first({batch, s.c_in, height, width, draw(s, (std::size_t)batch * s.c_in * height * width, 1, random)});
  Map y = x;
  Map scale = last_as_first({batch, s.c_in, 1, 1, draw(s, (std::size_t)batch * s.c_in, 1, random)});
  const auto over_map = [&](auto f) {
    for (int n = 0; n < y.n; ++n)
      for (int c = 0; c < y.c; ++c)
        for (int i = 0; i < y.h; ++i)
          for (int j = 0; j < y.w; ++j) f(n, c, y.at(n, c, i, j));
  };
  const auto mean_of = [&](Map& of) {
    Map mean{of.n, of.c, 1, 1, std::vector<double>((std::size_t)of.n * of.c)};
    over_map([&](int n, int c, double v) { mean.at(n, c, 0, 0) += v / (of.h * of.w); });
    return mean;
  };
  if (s.scaled) over_map([&](int n, int c, double& v) { v *= scale.at(n, c, 0, 0); });
  if (normalises(s)) {  // of numbers with a mean, as padded channels have none
    for (double& v : x.v) v = s.type == Type::float16 ? half_to_float(float_to_half((float)v + 2)) : (float)(v + 2);
    y = x;
    for (int n = 0; n < y.n; ++n)
      for (int i = 0; i < y.h; ++i)
        for (int j = 0; j < y.w; ++j) {
          double mean = 0, variance = 0;
          for (int c = 0; c < y.c; ++c) mean += y.at(n, c, i, j) / y.c;
          for (int c = 0; c < y.c; ++c) variance += std::pow(y.at(n, c, i, j) - mean, 2) / y.c;
          for (int c = 0; c < y.c; ++c)
            y.at(n, c, i, j) = (y.at(n, c, i, j) - mean) / std::sqrt(variance + s.norm_epsilon);
        }
  }
  if (s.mean) y = mean_of(y);
  const auto stage = [&](int outputs, int depth, const Window& w, bool depthwise, Act a) {
    Stage t;
    const int taps = w.kernel_h * w.kernel_w;
    t.weight = draw(s, (std::size_t)outputs * depth * taps, 1 / std::sqrt((double)depth * taps), random);
    t.bias = draw(s, outputs, 0.5, random);
    t.slope = draw(s, outputs, 0.5, random);
    y = convolve(y, outputs, depthwise, w, t.weight, t.bias, a, t.slope);
    return t;
  };
  Stage first, depthwise, project;
  if (s.first != Dense::none) first = stage(s.c_mid, s.c_in, s.first_window, false, s.first_act);
  if (s.depthwise && !s.passes) depthwise = stage(s.c_mid, 1, s.depthwise_window, true, s.depthwise_act);
  if (has_project(s)) project = stage(s.c_out, s.c_mid, s.project_window, false, s.project_act);
  Map residual = last_as_first({y.n, y.c, y.h, y.w, draw(s, y.v.size(), 1, random)});
  if (s.residual)
    for (std::size_t i = 0; i < y.v.size(); ++i) y.v[i] = act(s.output_act, y.v[i] + residual.v[i], 0);
  Map mean = mean_of(y);

  const auto vectors = [&](Stage& t, int channels, bool last) {
    const int padded = padded_vector(s, last);
    t.packed_bias.resize(padded), t.packed_slope.resize(padded);
    pack_vector(narrow<float>(t.bias).data(), channels, padded, t.packed_bias.data());
    pack_vector(narrow<float>(t.slope).data(), channels, padded, t.packed_slope.data());
  };
  if (s.first != Dense::none) {
    first.packed.resize(packed_first_bytes(s));
    pack_first(s, narrow<float>(first.weight).data(), first.packed.data());
    vectors(first, s.c_mid, false);
  }
  if (s.depthwise && !s.passes) {
    depthwise.packed.resize(packed_depthwise_bytes(s));
    pack_depthwise(s, narrow<float>(depthwise.weight).data(), depthwise.packed.data());
    vectors(depthwise, s.c_mid, false);
  }
  if (has_project(s)) {
    project.packed.resize(packed_project_bytes(s));
    pack_project(s, narrow<float>(project.weight).data(), project.packed.data());
    vectors(project, s.c_out, true);
  }
  Tensor xt(s, x, s.input_nchw), rt(s, residual, s.output_nchw);
  Map poison{y.n, y.c, y.h, y.w, std::vector<double>(y.v.size(), std::nan(""))};
  Tensor yt(s, poison, s.output_nchw);
  const Launch l = launch(s, batch, height, width, 2);  // few multiprocessors, so that resident blocks have many tiles
  if (l.out_h != y.h || l.out_w != y.w) return std::nan("");
  Map rows{y.n, y.c, l.pool_rows, 1, std::vector<double>((std::size_t)y.n * y.c * l.pool_rows, std::nan(""))};
  Tensor pt(s, rows, false), st(s, scale, false);
  Params p{xt.bytes.data(),
           yt.bytes.data(),
           rt.bytes.data(),
           first.packed.data(),
           first.packed_bias.data(),
           depthwise.packed.data(),
           depthwise.packed_bias.data(),
           project.packed.data(),
           project.packed_bias.data(),
           first.packed_slope.data(),
           depthwise.packed_slope.data(),
           project.packed_slope.data(),
           batch,
           height,
           width,
           l.mid_h,
           l.mid_w,
           l.out_h,
           l.out_w,
           l.tiles_x,
           l.tiles_y,
           st.bytes.data(),
           pt.bytes.data(),
           l.pool_rows,
           (int)l.tiles,
           (int)(seed & 1)};
  cpu::run_grid(l, seed, [&] { run_module<C>(p); });
  // Without a depthwise, 16 pixels of a row of sums may be of several images, so that rows depend on where one starts.
  if (!yt.repeats(s, y, s.output_nchw) || (s.pool && s.depthwise && !pt.repeats(s, rows, false)))
    return std::numeric_limits<double>::infinity();
  double error = 0, norm = 0, pool_error = 0, pool_norm = 0;
  if (s.pool)
    for (int n = 0; n < y.n; ++n)
      for (int c = 0; c < y.c; ++c) {
        double got = 0;
        for (int i = 0; i < l.pool_rows; ++i) got += pt.get(s, Tensor::offset(rows, n, c, i, 0, false)) / l.pool_rows;
        const double want = mean.at(n, c, 0, 0);
        pool_error += (got - want) * (got - want), pool_norm += want * want;
      }
  for (int n = 0; n < y.n; ++n)
    for (int c = 0; c < y.c; ++c)
      for (int i = 0; i < y.h; ++i)
        for (int j = 0; j < y.w; ++j) {
          const double got = yt.get(s, Tensor::offset(y, n, c, i, j, s.output_nchw)), want = y.at(n, c, i, j);
          error += (got - want) * (got - want), norm += want * want;
        }
  const auto share = [](double e, double n) { return e == 0 ? 0 : std::sqrt(e / n); };  // few outputs may all be zero
  const double own = share(error, norm), pools = s.pool ? share(pool_error, pool_norm) : 0;
  return own <= pools ? pools : own;  // either may be NaN
}

}  // namespace emulate
