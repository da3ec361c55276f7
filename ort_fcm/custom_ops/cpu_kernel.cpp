// The module on the CPU: stage after stage in float and channels-last, float16 tensors rounded after each stage.
// It is the reference for the CUDA kernels and what a CPU session runs; quick enough for that, no more.
#include <algorithm>
#include <cmath>
#include <functional>

#include "kernel.h"
#include "kernels/half.h"

// One library for all x86-64 CPUs, with the wide instructions where the CPU has them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FCM_VECTORISED __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define FCM_VECTORISED
#endif

namespace fcm {
namespace {

constexpr int kBlock = 16;  // output channels computed together
constexpr int kPixels = 4;  // neighbouring output pixels computed together

// Runs body(i) for i in [0, total) on ONNX Runtime's threads.
void parallel_for(ort::KernelContext* context, int64_t total, const std::function<void(size_t)>& body) {
  const auto call = [](void* data, size_t i) { (*static_cast<const std::function<void(size_t)>*>(data))(i); };
  check(ort::parallel_for(context, call, size_t(total), 0, const_cast<std::function<void(size_t)>*>(&body)));
}

// sums[p][j] = sum over k taps and c channels of rows[p * taps + k][c] * weight[k][c][j]
FCM_VECTORISED void multiply_block(const float* const* rows, int taps, int channels, const float* weight, float* sums) {
  static_assert(kPixels == 4);  // written out, as the compiler then keeps the sums in registers
  float acc[kPixels][kBlock] = {};
  for (int k = 0; k < taps; ++k) {
    const float *a = rows[k], *b = rows[taps + k], *c = rows[2 * taps + k], *d = rows[3 * taps + k];
    for (int i = 0; i < channels; ++i, weight += kBlock) {
      for (int j = 0; j < kBlock; ++j) {
        acc[0][j] += a[i] * weight[j];
        acc[1][j] += b[i] * weight[j];
        acc[2][j] += c[i] * weight[j];
        acc[3][j] += d[i] * weight[j];
      }
    }
  }
  std::copy(&acc[0][0], &acc[0][0] + kPixels * kBlock, sums);
}

// out[c] += sum over k taps of rows[k][c] * weight[k * stride + c]
FCM_VECTORISED void depthwise_pixel(const float* const* rows, int taps, int channels, const float* weight, float* out) {
  for (int k = 0; k < taps; ++k) {
    const float* row = rows[k];
    for (int c = 0; c < channels; ++c) out[c] += row[c] * weight[int64_t(k) * channels + c];
  }
}

template <class F>
inline void map(float* values, int64_t count, F f) {
  for (int64_t i = 0; i < count; ++i) values[i] = f(values[i]);
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// `values` is [pixels, channels]; `slope` has a value a channel.
void activate(const Act& act, const std::vector<float>& slope, float* values, int64_t pixels, int channels) {
  const int64_t count = pixels * channels;
  const float alpha = act.alpha, beta = act.beta;
  switch (act.kind) {
    case Activation::none:
      return;
    case Activation::relu:
      return map(values, count, [](float x) { return std::max(x, 0.0f); });
    case Activation::clip:
      return map(values, count, [=](float x) { return std::min(std::max(x, alpha), beta); });
    case Activation::hardswish:
      return map(values, count, [](float x) { return x * std::min(std::max(x / 6 + 0.5f, 0.0f), 1.0f); });
    case Activation::silu:
      return map(values, count, [](float x) { return x * sigmoid(x); });
    case Activation::hardsigmoid:
      return map(values, count, [=](float x) { return std::min(std::max(alpha * x + beta, 0.0f), 1.0f); });
    case Activation::sigmoid:
      return map(values, count, sigmoid);
    case Activation::gelu:
      return map(values, count, [](float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); });
    case Activation::gelu_tanh:
      return map(values, count,
                 [](float x) { return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); });
    case Activation::leakyrelu:
      return map(values, count, [=](float x) { return x < 0 ? alpha * x : x; });
    case Activation::prelu:
      for (int64_t i = 0; i < count; ++i)
        if (values[i] < 0) values[i] *= slope[size_t(i % channels)];
      return;
    case Activation::tanh:
      return map(values, count, [](float x) { return std::tanh(x); });
  }
}

// A stage with its weight laid out for the loops above.
class CpuStage {
 public:
  explicit CpuStage(Stage stage) : stage_(std::move(stage)), zeros_(size_t(stage_.in_channels)) {
    const int taps = this->taps(), out = stage_.out_channels, in = stage_.in_channels;
    const std::vector<float> original = std::move(stage_.weight);
    stage_.weight.clear();
    if (stage_.kind == StageKind::depthwise) {
      weight_.resize(size_t(taps) * out);
      for (int c = 0; c < out; ++c)
        for (int k = 0; k < taps; ++k) weight_[size_t(k) * out + c] = original[size_t(c) * taps + k];
      return;
    }
    weight_.resize(size_t(round_up(out, kBlock)) * taps * in);
    for (int m = 0; m < out; ++m)
      for (int c = 0; c < in; ++c)
        for (int k = 0; k < taps; ++k)
          weight_[((size_t(m / kBlock) * taps + k) * in + c) * kBlock + m % kBlock] =
              original[(size_t(m) * in + c) * taps + k];
  }

  const Stage& stage() const { return stage_; }

  // One row of output, [width, out channels]; `image` is [height, width, in channels].
  void row(const float* image, MapSize in, int64_t out_row, int64_t out_width, float* out) const {
    const int channels = stage_.out_channels, taps = this->taps();
    const float* const bias = stage_.bias.empty() ? nullptr : stage_.bias.data();
    std::vector<const float*> rows(size_t(taps) * kPixels);
    for (int64_t x = 0; x < out_width; x += kPixels) {
      const int pixels = int(std::min<int64_t>(kPixels, out_width - x));
      for (int p = 0; p < kPixels; ++p)
        find_rows(image, in, out_row, x + std::min(p, pixels - 1), &rows[size_t(p * taps)]);
      float* const first = out + x * channels;
      if (stage_.kind == StageKind::depthwise) {
        for (int p = 0; p < pixels; ++p) {
          float* const pixel = first + int64_t(p) * channels;
          if (bias)
            std::copy(bias, bias + channels, pixel);
          else
            std::fill(pixel, pixel + channels, 0.0f);
          depthwise_pixel(&rows[size_t(p * taps)], taps, channels, weight_.data(), pixel);
        }
      } else {
        dense_pixels(rows.data(), pixels, bias, first);
      }
    }
    activate(stage_.act, stage_.slope, out, out_width, channels);
  }

 private:
  int taps() const { return stage_.window.kernel_h * stage_.window.kernel_w; }

  // For each tap of the output pixel (y, x), the input pixel it reads: zeros outside the image.
  void find_rows(const float* image, MapSize in, int64_t y, int64_t x, const float** rows) const {
    const Window& w = stage_.window;
    for (int ky = 0; ky < w.kernel_h; ++ky)
      for (int kx = 0; kx < w.kernel_w; ++kx) {
        const int64_t iy = y * w.stride_h - w.pad_top + int64_t(ky) * w.dilation_h;
        const int64_t ix = x * w.stride_w - w.pad_left + int64_t(kx) * w.dilation_w;
        const bool inside = iy >= 0 && iy < in.height && ix >= 0 && ix < in.width;
        *rows++ = inside ? image + (iy * in.width + ix) * stage_.in_channels : zeros_.data();
      }
  }

  void dense_pixels(const float* const* rows, int pixels, const float* bias, float* out) const {
    const int channels = stage_.out_channels, taps = this->taps();
    float sums[kPixels * kBlock];
    for (int first = 0; first < channels; first += kBlock) {
      multiply_block(rows, taps, stage_.in_channels, &weight_[size_t(first) * taps * stage_.in_channels], sums);
      const int count = std::min(kBlock, channels - first);
      for (int p = 0; p < pixels; ++p)
        for (int j = 0; j < count; ++j)
          out[int64_t(p) * channels + first + j] = sums[p * kBlock + j] + (bias ? bias[first + j] : 0.0f);
    }
  }

  Stage stage_;
  std::vector<float> weight_;  // depthwise [tap][channel]; dense [block of kBlock][tap][in channel][kBlock]
  std::vector<float> zeros_;
};

// A tensor of the call, indexed in its own layout and type.
struct View {
  const void* data;
  bool half, nchw;
  MapSize size;
  int channels;

  // Elements from the tensor's start to a row (counted through the batch), and from pixel to pixel and channel to
  // channel.
  int64_t row_start(int64_t row) const {
    const int64_t image = row / size.height, y = row % size.height;
    return nchw ? (image * channels * size.height + y) * size.width : row * size.width * channels;
  }
  int64_t pixel_step() const { return nchw ? 1 : channels; }
  int64_t channel_step() const { return nchw ? size.height * size.width : 1; }

  // Calls f(i, v) for each element of a row: i from the tensor's start, v in a channels-last row.
  template <class F>
  void each(int64_t row, F f) const {
    const int64_t start = row_start(row), pixel = pixel_step(), channel = channel_step();
    int64_t v = 0;
    for (int64_t x = 0; x < size.width; ++x)
      for (int64_t c = 0; c < channels; ++c) f(start + x * pixel + c * channel, v++);
  }
  float load(int64_t i) const {
    return half ? half_to_float(static_cast<const uint16_t*>(data)[i]) : static_cast<const float*>(data)[i];
  }
  void store(int64_t i, float value) const {
    if (half)
      static_cast<uint16_t*>(const_cast<void*>(data))[i] = float_to_half(value);
    else
      static_cast<float*>(const_cast<void*>(data))[i] = value;
  }
};

class CpuKernel : public Kernel {
 public:
  explicit CpuKernel(Module module) : module_(std::move(module)) {
    if (module_.varying) return;
    for (Stage& stage : module_.stages) {
      stages_.emplace_back(stage);
      stage.weight.clear(), stage.weight.shrink_to_fit();
    }
  }

  const std::string& node() const override { return module_.node; }

  void compute(ort::KernelContext* context) override {
    if (module_.varying) return CpuKernel(with_weights(module_, context)).compute(context);
    const CallInputs inputs = call_inputs(module_, context);
    const CallShape& shape = inputs.shape;
    void* const y = call_output(shape.output_shape, context);
    void* const pool = module_.pool ? call_output(pool_shape(module_, shape.batch, 1), context, 1) : nullptr;
    if (!shape.batch) return;
    const View x{inputs.x, module_.half, module_.input_nchw, inputs.map, module_.stages.front().in_channels};
    std::vector<float> buffer;
    const float* input = static_cast<const float*>(inputs.x);
    if (module_.half || module_.input_nchw || module_.scaled || module_.norm_epsilon > 0) {
      buffer = as_float_nhwc(context, x, shape.batch);
      if (module_.scaled) multiply_channels(buffer, View{inputs.scale, module_.half, false, {1, 1}, x.channels}, shape);
      if (module_.norm_epsilon > 0) normalise(context, buffer, x.channels);
      input = buffer.data();
    }
    if (module_.mean) {
      buffer = mean_of(input, shape.batch, inputs.map, x.channels);
      input = buffer.data();
    }
    for (size_t i = 0; i + 1 < stages_.size(); ++i) {
      buffer = middle_stage(context, stages_[i], input, shape.batch, shape.sizes[i], shape.sizes[i + 1]);
      input = buffer.data();
    }
    const size_t last = stages_.size() - 1;
    View out{y, module_.half, module_.output_nchw, shape.sizes[last + 1], module_.stages.back().out_channels};
    View residual = out;
    residual.data = inputs.residual;
    last_stage(context, stages_[last], input, shape.batch, shape.sizes[last], out, residual);
    if (!pool) return;
    const std::vector<float> mean =
        mean_of(as_float_nhwc(context, out, shape.batch).data(), shape.batch, out.size, out.channels);
    const View rows{pool, module_.half, false, {1, 1}, out.channels};
    for (size_t i = 0; i < mean.size(); ++i) rows.store(int64_t(i), mean[i]);
  }

 private:
  static std::vector<float> as_float_nhwc(ort::KernelContext* context, const View& x, int64_t batch) {
    const int64_t row_size = x.size.width * x.channels;
    std::vector<float> out(size_t(batch * x.size.height * row_size));
    parallel_for(context, batch * x.size.height, [&](size_t row) {
      float* values = &out[row * size_t(row_size)];
      x.each(int64_t(row), [&](int64_t i, int64_t v) { values[v] = x.load(i); });
    });
    return out;
  }

  // Of [batch, height, width, channels], over height and width.
  std::vector<float> mean_of(const float* map, int64_t batch, MapSize size, int channels) const {
    const int64_t pixels = size.height * size.width;
    std::vector<float> mean;
    std::vector<double> sums(size_t(channels), 0.0);
    for (int64_t image = 0; image < batch; ++image) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i = 0; i < pixels; ++i, map += channels)
        for (int c = 0; c < channels; ++c) sums[size_t(c)] += map[c];
      for (double sum : sums) mean.push_back(float(sum / double(pixels)));
    }
    round(mean.data(), int64_t(mean.size()));
    return mean;
  }

  // Each image's channels times its factors.
  void multiply_channels(std::vector<float>& map, const View& factors, const CallShape& shape) const {
    const int64_t pixels = shape.sizes[0].height * shape.sizes[0].width;
    float* value = map.data();
    for (int64_t image = 0; image < shape.batch; ++image)
      for (int64_t i = 0; i < pixels; ++i)
        for (int c = 0; c < factors.channels; ++c) *value++ *= factors.load(image * factors.channels + c);
    round(map.data(), int64_t(map.size()));
  }

  // Each pixel over its channels.
  void normalise(ort::KernelContext* context, std::vector<float>& map, int channels) const {
    parallel_for(context, int64_t(map.size()) / channels, [&](size_t pixel) {
      float* const x = &map[pixel * size_t(channels)];
      double mean = 0, variance = 0;
      for (int c = 0; c < channels; ++c) mean += double(x[c]) / channels;
      for (int c = 0; c < channels; ++c) variance += (x[c] - mean) * (x[c] - mean) / channels;
      const double scale = 1 / std::sqrt(variance + double(module_.norm_epsilon));
      for (int c = 0; c < channels; ++c) x[c] = float((x[c] - mean) * scale);
      round(x, channels);
    });
  }

  void round(float* values, int64_t count) const {
    if (module_.half) map(values, count, [](float v) { return half_to_float(float_to_half(v)); });
  }

  std::vector<float> middle_stage(ort::KernelContext* context, const CpuStage& stage, const float* input, int64_t batch,
                                  MapSize in, MapSize out) const {
    const int64_t in_image = in.height * in.width * stage.stage().in_channels;
    const int64_t row_size = out.width * stage.stage().out_channels;
    std::vector<float> result(size_t(batch * out.height * row_size));
    parallel_for(context, batch * out.height, [&](size_t row) {
      const int64_t image = int64_t(row) / out.height, y = int64_t(row) % out.height;
      float* const values = &result[row * size_t(row_size)];
      stage.row(input + image * in_image, in, y, out.width, values);
      round(values, row_size);
    });
    return result;
  }

  void last_stage(ort::KernelContext* context, const CpuStage& stage, const float* input, int64_t batch, MapSize in,
                  const View& y, const View& residual) const {
    const int64_t in_image = in.height * in.width * stage.stage().in_channels, row_size = y.size.width * y.channels;
    parallel_for(context, batch * y.size.height, [&](size_t index) {
      const int64_t row = int64_t(index), image = row / y.size.height;
      std::vector<float> buffer;
      float* values = static_cast<float*>(const_cast<void*>(y.data)) + row * row_size;
      if (y.half || y.nchw) {
        buffer.resize(size_t(row_size));
        values = buffer.data();
      }
      stage.row(input + image * in_image, in, row % y.size.height, y.size.width, values);
      if (module_.residual) {
        round(values, row_size);
        residual.each(row, [&](int64_t i, int64_t v) { values[v] += residual.load(i); });
        activate(module_.output_act, {}, values, y.size.width, y.channels);
      }
      if (!buffer.empty()) y.each(row, [&](int64_t i, int64_t v) { y.store(i, values[v]); });
    });
  }

  Module module_;
  std::vector<CpuStage> stages_;
};

}  // namespace

std::unique_ptr<Kernel> make_cpu_kernel(Module module) { return std::make_unique<CpuKernel>(std::move(module)); }

}  // namespace fcm
