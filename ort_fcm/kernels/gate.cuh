// The gate of a squeeze-and-excite: two pointwise layers on the mean of X over its map. There is little arithmetic and
// much to wait for, so weights come to shared memory while the kernel in front still runs, and the blocks of a cluster
// share the channels of both layers: each weight is read by one of them, and they meet once, to swap the middle.
#pragma once

#include "mean.cuh"

namespace fcm {

template <class C>
struct Gate {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;
  static constexpr int kThreads = threads(S), kImages = S.tile.images, kLane = L::kLane;
  static constexpr int kDepth = gate_depth(S, S.c_in), kHiddenDepth = gate_depth(S, S.c_mid);
  static constexpr int kMidShare = gate_share(S, S.c_mid), kOutShare = gate_share(S, S.c_out);
  static constexpr int kMidBytes = gate_weight_bytes(S, S.c_mid, S.c_in);
  static constexpr int kOutBytes = gate_weight_bytes(S, S.c_out, S.c_mid);
  static constexpr int kPartsAt = gate_mean_bytes(S), kHiddenAt = kPartsAt + mean_parts_bytes(S);
  static constexpr int kMidAt = kHiddenAt + gate_hidden_bytes(S), kOutAt = kMidAt + kMidBytes;

  const Params& p;
  char* const shared;
  const int image0;

  FCM_DEVICE explicit Gate(const Params& params)
      : p(params), shared(shared_memory()), image0(block_x() * S.tile.images) {}

  FCM_DEVICE static int rank() { return S.tile.split > 1 ? block_z() : 0; }
  FCM_DEVICE float* means() const { return (float*)shared; }
  FCM_DEVICE float* hidden() const { return (float*)(shared + kHiddenAt); }

  // Channels of a lane's 16 bytes in two halves, so that neighbouring lanes read neighbouring 16 bytes.
  FCM_DEVICE static int place(int depth, int vector, int i) { return i / 4 * (depth / 2) + vector * 4 + i % 4; }
  FCM_DEVICE static int place(int depth, int channel) { return place(depth, channel / kLane, channel % kLane); }

  template <int BYTES>
  FCM_DEVICE void copy(int to, const void* weights) const {
    for (int i = thread_index() * 16; i < BYTES; i += kThreads * 16)
      copy_async(shared + to + i, (const char*)weights + (long long)rank() * BYTES + i);
  }

  FCM_DEVICE void average() const {
    constexpr int kVectors = kDepth / kLane;
    Mean<C>::run(
        p, image0, min(kImages, p.batch - image0), kVectors, (float*)(shared + kPartsAt),
        [](int vector) { return vector * kLane; },
        [&](int image, int vector, int i, float mean) { means()[image * kDepth + place(kDepth, vector, i)] = mean; });
    block_sync();
  }

  // ---- The layers

  // Calls store(image, row, sum) for `rows` rows of weights, of DEPTH elements, times a vector for each image that lies
  // at `from` as place() says. A row is as many lanes' as have work, and each holds several rows.
  template <int DEPTH, class Store>
  FCM_DEVICE static void multiply(const char* weights, const float* from, int rows, int images, Store store) {
    constexpr int kVectors = DEPTH / kLane, kRows = 4, kTogether = min(kImages, 4);
    constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : kVectors > 2 ? 4 : kVectors;
    constexpr int kWarpRows = 32 / kLanes * kRows;
    const int lane = L::lane() % kLanes, own = L::lane() / kLanes;
    for (int base = L::warp() * kWarpRows; base < rows; base += warps(S) * kWarpRows) {
      for (int image = 0; image < images; image += kTogether) {
        float sum[kRows][kTogether] = {};
        for (int vector = lane; vector < kVectors; vector += kLanes) {
          float w[kRows][kLane];
          FCM_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const int row = min(base + r * (32 / kLanes) + own, rows - 1);  // rows beyond stand in for the last
            L::unpack(w[r], *(const Vec*)(weights + (row * DEPTH + vector * kLane) * L::kElement));
          }
          FCM_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            if (image + i >= kImages) continue;
            FCM_UNROLL
            for (int j = 0; j < kLane; j += 4) {
              const Vec v = *(const Vec*)(from + (image + i) * DEPTH + place(DEPTH, vector, j));
              FCM_UNROLL
              for (int k = 0; k < 4; ++k) {
                FCM_UNROLL
                for (int r = 0; r < kRows; ++r) sum[r][i] += w[r][j + k] * bits_float(v.r[k]);
              }
            }
          }
        }
        FCM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          FCM_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            FCM_UNROLL
            for (int mask = 1; mask < kLanes; mask *= 2) sum[r][i] += shuffle_xor(sum[r][i], mask);
            const int row = base + r * (32 / kLanes) + own;
            if (lane == 0 && row < rows && image + i < images) store(image + i, row, sum[r][i]);
          }
        }
      }
    }
  }

  // Each block has its share of the middle in its place; the others come from their shared memory.
  FCM_DEVICE void swap_hidden() const {
    if constexpr (S.tile.split > 1) {
      cluster_sync();
      constexpr int kFours = kHiddenDepth / 4;
      for (int i = thread_index(); i < kImages * kFours; i += kThreads) {
        const int c = i % kFours * 4, from = c / kMidShare;
        float* at = hidden() + i / kFours * kHiddenDepth + place(kHiddenDepth, c);
        if (from != rank() && from < S.tile.split) *(Vec*)at = cluster_load(at, from);
      }
      cluster_give_up();
    }
    block_sync();
  }

  FCM_DEVICE void run() const {
    const char *mid = (const char*)p.first_weight, *out = (const char*)p.project_weight;
    let_next_kernel_start();
    if constexpr (S.tile.resident) {
      copy<kMidBytes>(kMidAt, mid), copy<kOutBytes>(kOutAt, out);
      copy_async_commit();
      mid = shared + kMidAt, out = shared + kOutAt;
    } else {
      mid += (long long)rank() * kMidBytes, out += (long long)rank() * kOutBytes;
    }
    // What pads the middle is multiplied by weights of zero, and must be a number.
    for (int i = thread_index(); i < kImages * kHiddenDepth; i += kThreads) hidden()[i] = 0;
    wait_for_earlier_kernels();
    if constexpr (S.tile.resident) copy_async_wait<0>();
    average();
    const int images = min(kImages, p.batch - image0);
    const int mid0 = rank() * kMidShare, out0 = rank() * kOutShare;
    multiply<kDepth>(mid, means(), min(kMidShare, S.c_mid - mid0), images, [&](int image, int row, float sum) {
      const int c = mid0 + row;
      const float slope = S.first_act.kind == Activation::prelu ? p.first_slope[c] : 0.f;
      hidden()[image * kHiddenDepth + place(kHiddenDepth, c)] = activate(S.first_act, sum + p.first_bias[c], slope);
    });
    swap_hidden();
    multiply<kHiddenDepth>(out, hidden(), min(kOutShare, S.c_out - out0), images, [&](int image, int row, float sum) {
      const int c = out0 + row;
      const float slope = S.project_act.kind == Activation::prelu ? p.project_slope[c] : 0.f;
      const float y = activate(S.project_act, sum + p.project_bias[c], slope);
      const long long at = (long long)(image0 + image) * S.c_out + c;
      if constexpr (L::kHalf)
        ((unsigned short*)p.y)[at] = (unsigned short)(half2_pack(y, 0.f) & 0xffff);
      else
        ((float*)p.y)[at] = y;
    });
    if constexpr (S.tile.split > 1) cluster_wait();  // nobody leaves while its memory is read
  }
};

}  // namespace fcm
