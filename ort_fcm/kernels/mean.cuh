// The mean of X over its map. Threads take runs of channels of an image; where there are more threads than runs,
// several share the rows of one, and their sums are added in one order. How many share depends on the tile alone, not
// on how many images there are for it, so that an image's bits never change.
#pragma once

#include "input.cuh"

namespace fcm {

template <class C>
struct Mean {
  using L = Lanes<C>;
  static constexpr Spec S = C::spec;
  static constexpr int kLane = L::kLane, kThreads = threads(S);
  static constexpr int kAtOnce = 8;  // loads of a thread that are on their way together

  // The sum of rows first, first + step, ... of `lane_channels` channels from c on.
  FCM_DEVICE static void add(float (&sum)[kLane], const Params& p, int image, int first, int step, int c) {
    const int rows = p.in_h * p.in_w;
    for (int row = first; row < rows; row += kAtOnce * step) {
      Vec v[kAtOnce];
      FCM_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        v[i] = Input<C>::template load<Dense::none, kLane>(p, Window{}, image, 0, row + i * step, c,
                                                           row + i * step < rows);
      FCM_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        float x[kLane];
        L::unpack(x, v[i]);
        FCM_UNROLL
        for (int j = 0; j < kLane; ++j) sum[j] += x[j];
      }
    }
  }

  // Calls store(image, vector, i, mean) for each of `images` images from image0 on (a tile's, or those left of them),
  // `vectors` runs of channels, of which each starts at channel(vector), and place in a run. `parts` has room for a
  // float a thread and place.
  template <class Channel, class Store>
  FCM_DEVICE static void run(const Params& p, int image0, int images, int vectors, float* parts, Channel channel,
                             Store store) {
    const int items = S.tile.images * vectors, slots = min(kThreads / items, p.in_h * p.in_w);
    const float scale = 1.f / ((float)p.in_h * (float)p.in_w);
    for (int i = thread_index(); i < items * max(1, slots); i += kThreads) {
      const int slot = i / items, item = i - slot * items, image = item / vectors, vector = item - image * vectors;
      if (image >= images) continue;
      float sum[kLane] = {};
      add(sum, p, image0 + image, slot, max(1, slots), channel(vector));
      FCM_UNROLL
      for (int j = 0; j < kLane; ++j) {
        if (slots > 1)
          parts[i * kLane + j] = sum[j];
        else
          store(image, vector, j, sum[j] * scale);
      }
    }
    if (slots <= 1) return;
    block_sync();
    for (int i = thread_index(); i < items * kLane; i += kThreads) {
      const int item = i / kLane, image = item / vectors;
      if (image >= images) continue;
      float sum = 0;
      for (int slot = 0; slot < slots; ++slot) sum += parts[slot * items * kLane + i];
      store(image, item - image * vectors, i % kLane, sum * scale);
    }
  }
};

}  // namespace fcm
