// A lone depthwise. Neighbouring lanes have neighbouring channels, so that a pixel is a contiguous load of a warp, and
// a thread has all taps of its channels in registers: it computes a patch of pixels straight from global memory, where
// the rows of other patches wait in L1. No thread waits for another, and there is no shared memory.
#pragma once

#include "depthwise.cuh"

namespace fcm {

template <class C>
struct Strip {
  using L = Lanes<C>;
  using D = Depthwise<C>;
  static constexpr Spec S = C::spec;
  static constexpr Window W = S.depthwise_window;
  static constexpr int kWords = strip_words(S), kPack = word_channels(S.type), kChannels = kWords * kPack;
  static constexpr int kLanes = strip_lanes(S), kPatches = strip_patches(S), kTaps = depthwise_taps(S);
  static constexpr int kHeight = S.tile.tile_h, kWidth = S.tile.tile_w;  // of a patch
  static constexpr int kRows = halo(kHeight, W.kernel_h, W.stride_h, W.dilation_h);
  static constexpr int kColumns = halo(kWidth, W.kernel_w, W.stride_w, W.dilation_w);
  // Rows of X that are on their way while one is multiplied.
  static constexpr int kAhead = max(1, min(kRows - 1, 24 / (kColumns * kWords)));
  static constexpr bool kVectorsIn = vector_input(S),
                        kVectorsOut = !S.output_nchw && S.c_out % lane_channels(S.type) == 0;

  struct Words {
    u32 r[kWords];
  };
  struct Row {
    Words column[kColumns];
  };

  const Params& p;
  int c;  // this thread's first channel
  Words weights[kTaps], bias;
  float slope[kChannels];

  FCM_DEVICE explicit Strip(const Params& params) : p(params) {}

  FCM_DEVICE void load_weights() {
    constexpr int kGroup = L::kGroup;
    const char* from =
        (const char*)p.depthwise_weight + (long long)(c / kGroup) * depthwise_group_bytes(S) + c % kGroup * L::kElement;
    FCM_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) load_constants(weights[tap].r, from + tap * depthwise_tap_bytes(S));
    FCM_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const float* b = p.depthwise_bias + c + i * kPack;
      bias.r[i] = L::kHalf ? half2_pack(b[0], b[kPack - 1]) : float_bits(b[0]);
    }
    FCM_UNROLL
    for (int i = 0; i < kChannels; ++i)
      slope[i] = S.depthwise_act.kind == Activation::prelu ? p.depthwise_slope[c + i] : 0.f;
  }

  // The output row (column) of the patch to which input row `r` goes with filter row `k`, or -1.
  static constexpr int output(int r, int k, int stride, int dilation, int outputs) {
    const int d = r - k * dilation;
    return d >= 0 && d % stride == 0 && d / stride < outputs ? d / stride : -1;
  }
  // Whether any output of the patch takes input row r, or column x.
  static constexpr bool meets_row(int r) {
    for (int k = 0; k < W.kernel_h; ++k)
      if (output(r, k, W.stride_h, W.dilation_h, kHeight) >= 0) return true;
    return false;
  }
  static constexpr bool meets_column(int x) {
    for (int k = 0; k < W.kernel_w; ++k)
      if (output(x, k, W.stride_w, W.dilation_w, kWidth) >= 0) return true;
    return false;
  }

  struct Place {
    int top, bottom, left, right;  // rows and columns of the patch's input that lie on the map: from, to before
    int rows, columns;             // of output that do
    const char* corner;            // this thread's channels of the first input pixel, which may lie outside
    char* out;                     // and of the patch's first pixel in Y
    const char* residual;
  };
  FCM_DEVICE Place find(int patch) const {
    const int tiles = p.tiles_x * p.tiles_y, n = patch / tiles, rest = patch - n * tiles, row = rest / p.tiles_x;
    const int y = row * kHeight, x = (rest - row * p.tiles_x) * kWidth;
    const int in_y = y * W.stride_h - W.pad_top, in_x = x * W.stride_w - W.pad_left;
    const long long at = S.input_nchw ? (((long long)n * S.c_in + c) * p.in_h + in_y) * p.in_w + in_x
                                      : (((long long)n * p.in_h + in_y) * p.in_w + in_x) * S.c_in + c;
    const long long to = (S.output_nchw ? (((long long)n * S.c_out + c) * p.out_h + y) * p.out_w + x
                                        : (((long long)n * p.out_h + y) * p.out_w + x) * S.c_out + c) *
                         L::kElement;
    return {-in_y,
            p.in_h - in_y,
            -in_x,
            p.in_w - in_x,
            p.out_h - y,
            p.out_w - x,
            (const char*)p.x + at * L::kElement,
            (char*)p.y + to,
            (const char*)p.residual + to};
  }

  // No more than the pads lies in front of the map.
  FCM_DEVICE static bool has_row(const Place& at, int r) { return (r >= W.pad_top || r >= at.top) && r < at.bottom; }
  FCM_DEVICE static bool has_column(const Place& at, int x) {
    return (x >= W.pad_left || x >= at.left) && x < at.right;
  }

  FCM_DEVICE void load_row(Row& to, const Place& at, int r) const {
    const char* from = at.corner + (long long)r * p.in_w * ((S.input_nchw ? 1 : S.c_in) * L::kElement);
    const bool row = has_row(at, r);
    FCM_UNROLL
    for (int x = 0; x < kColumns; ++x) {
      if (!meets_column(x)) continue;
      const bool valid = row && has_column(at, x);
      const char* pixel = from + x * ((S.input_nchw ? 1 : S.c_in) * L::kElement);
      if constexpr (kVectorsIn) {
        load_if(to.column[x].r, pixel, valid);
      } else {
        const long long step = S.input_nchw ? (long long)p.in_h * p.in_w : 1;
        to.column[x] = Words{};
        FCM_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          if (!valid || c + i >= S.c_in) continue;
          if constexpr (L::kHalf)
            to.column[x].r[i / 2] |= (u32)((const unsigned short*)pixel)[i * step] << i % 2 * 16;
          else
            to.column[x].r[i] = ((const u32*)pixel)[i * step];
        }
      }
    }
  }

  template <int R>
  FCM_DEVICE void multiply_row(Words (&sum)[kHeight][kWidth], const Row& row) const {
    FCM_UNROLL
    for (int x = 0; x < kColumns; ++x) {
      FCM_UNROLL
      for (int ky = 0; ky < W.kernel_h; ++ky) {
        FCM_UNROLL
        for (int kx = 0; kx < W.kernel_w; ++kx) {
          const int py = output(R, ky, W.stride_h, W.dilation_h, kHeight);
          const int px = output(x, kx, W.stride_w, W.dilation_w, kWidth);
          if (py < 0 || px < 0) continue;
          FCM_UNROLL
          for (int i = 0; i < kWords; ++i) {
            const u32 v = row.column[x].r[i], w = weights[ky * W.kernel_w + kx].r[i];
            u32& s = sum[py][px].r[i];
            s = L::kHalf ? half2_fma(v, w, s) : float_bits(bits_float(v) * bits_float(w) + bits_float(s));
          }
        }
      }
    }
  }

  // Row `py` of the patch, of which the products are summed up. `total` are its channels' sums over the patch.
  FCM_DEVICE void store_row(const Place& at, int py, const Words (&sum)[kWidth], float (&total)[kChannels]) const {
    constexpr int kPixel = (S.output_nchw ? 1 : S.c_out) * L::kElement;
    const long long row = (long long)py * p.out_w * kPixel, area = (long long)p.out_h * p.out_w;
    const long long step = (S.output_nchw ? area : 1) * L::kElement;  // from channel to channel
    FCM_UNROLL
    for (int px = 0; px < kWidth; ++px) {
      if (px >= at.columns) continue;
      Words out = D::template finish<false>(sum[px], slope);
      if constexpr (S.residual) add_residual(out, at.residual + row + px * kPixel, step);
      char* to = at.out + row + px * kPixel;
      if constexpr (kVectorsOut) {
        store_words(out.r, to);
      } else {
        FCM_UNROLL
        for (int k = 0; k < kChannels; ++k)
          if (c + k < S.c_out) L::put(to + k * step, channel(out, k));
      }
      if constexpr (S.pool) {
        FCM_UNROLL
        for (int k = 0; k < kChannels; ++k) total[k] += channel(out, k);
      }
    }
  }
  FCM_DEVICE static float channel(const Words& v, int k) {
    return !L::kHalf ? bits_float(v.r[k / kPack]) : k % 2 ? half2_high(v.r[k / kPack]) : half2_low(v.r[k / kPack]);
  }
  FCM_DEVICE void add_residual(Words& v, const char* from, long long step) const {
    float x[kChannels];
    FCM_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      float r = 0;
      if (c + k < S.c_out)
        r = L::kHalf ? half_float(*(const unsigned short*)(from + k * step)) : *(const float*)(from + k * step);
      x[k] = activate<L::kHalf>(S.output_act, channel(v, k) + r, 0.f);
    }
    FCM_UNROLL
    for (int i = 0; i < kWords; ++i)
      v.r[i] = L::kHalf ? half2_pack(x[i * kPack], x[i * kPack + kPack - 1]) : float_bits(x[i]);
  }
  FCM_DEVICE static void store_words(const u32 (&r)[1], char* to) { *(u32*)to = r[0]; }
  FCM_DEVICE static void store_words(const u32 (&r)[2], char* to) { *(HalfVec*)to = HalfVec{{r[0], r[1]}}; }
  FCM_DEVICE static void store_words(const u32 (&r)[4], char* to) { *(Vec*)to = Vec{{r[0], r[1], r[2], r[3]}}; }

  // Multiplies row R of the patch's input and those that follow, while others are on their way.
  template <int R>
  FCM_DEVICE void step(const Place& at, Words (&sum)[kHeight][kWidth], Row (&rows)[kAhead + 1],
                       float (&total)[kChannels]) const {
    constexpr int kNext = R + kAhead, kHere = (R + kAhead + 1) % (kAhead + 1);
    if constexpr (kNext < kRows && meets_row(kNext)) load_row(rows[(kHere + kAhead) % (kAhead + 1)], at, kNext);
    if constexpr (R >= 0) {
      if constexpr (meets_row(R))
        if (has_row(at, R)) multiply_row<R>(sum, rows[kHere]);
      constexpr int kSince = R - (W.kernel_h - 1) * W.dilation_h;  // the first output row was done
      if constexpr (kSince >= 0 && kSince % W.stride_h == 0)
        store_row(at, kSince / W.stride_h, sum[kSince / W.stride_h], total);
      // A branch after every row keeps the loads of later ones from being gathered in front of it.
      if (at.rows <= (kSince < 0 ? 0 : kSince / W.stride_h + 1)) return;
    }
    if constexpr (R + 1 < kRows) step<R + 1>(at, sum, rows, total);
  }

  FCM_DEVICE void run(int patch) const {
    const Place at = find(patch);
    Words sum[kHeight][kWidth];
    float total[kChannels] = {};
    FCM_UNROLL
    for (int py = 0; py < kHeight; ++py) {
      FCM_UNROLL
      for (int px = 0; px < kWidth; ++px) sum[py][px] = bias;
    }
    Row rows[kAhead + 1];
    step<-kAhead>(at, sum, rows, total);
    if constexpr (S.pool) {
      const float scale = (float)p.pool_rows / ((float)p.out_h * (float)p.out_w);
      const long long row = ((long long)patch * S.c_out + c) * L::kElement;  // patches of an image follow one another
      FCM_UNROLL
      for (int k = 0; k < kChannels; ++k)
        if (c + k < S.c_out) L::put((char*)p.pool + row + k * L::kElement, total[k] * scale);
    }
  }

  FCM_DEVICE void run() {
    let_next_kernel_start();
    int slot = thread_index() / kLanes;
    if constexpr (kLanes % 32 == 0) slot = warp_uniform(slot);
    c = block_y() * block_n(S) + thread_index() % kLanes * kChannels;
    if (slot >= kPatches || c >= S.c_in) return;
    load_weights();
    wait_for_earlier_kernels();
    const int patches = p.tiles_x * p.tiles_y * p.batch;
    for (int patch = block_x() * kPatches + slot; patch < patches; patch += grid_x() * kPatches) {
      run(p.backward ? patches - 1 - patch : patch);
      if constexpr (!S.tile.resident) break;
    }
  }
};

}  // namespace fcm
