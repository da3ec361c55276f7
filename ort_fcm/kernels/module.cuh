// The fused module: one thread block walks over its middle channels in chunks. Step i copies the weights (and inputs)
// that step i + 1 needs, computes the middle tensor of chunk i + 1 into one buffer while the depthwise reads chunk i
// from the other, and adds the products of chunk i (or i - 1, where warps exchange fragments) to the result in
// registers. So one barrier a step suffices.
#pragma once

#include "depthwise.cuh"
#include "gate.cuh"
#include "input.cuh"
#include "norm.cuh"
#include "output.cuh"
#include "pool.cuh"
#include "primitives.cuh"
#include "spec.h"
#include "strip.cuh"

namespace fcm {

template <class C>
struct Module {
  using L = Lanes<C>;
  using In = Input<C>;
  using T = TilePlace<C>;
  using Out = Output<C>;
  static constexpr Spec S = C::spec;
  static constexpr bool kFirst = S.first != Dense::none, kProject = has_project(S);
  static constexpr bool kStreams = streams_input(S), kExchanges = exchanges(S);
  // Whether fragments are computed, and not copied, into the exchange buffers: read a step later.
  static constexpr int kLag = kExchanges && !kStreams ? 1 : 0;
  // Whether `first` has places for its results in the halo region, and whether these are Y instead.
  static constexpr bool kPlaced = kFirst && S.depthwise, kPasses = S.passes;
  // The first stage runs a chunk ahead of the depthwise that reads its result.
  static constexpr int kAhead = kPlaced && !kPasses ? 1 : 0;
  static constexpr int kGroup = L::kGroup, kChunkGroups = chunk_groups(S), P = S.tile.patch_h;
  static constexpr int kThreads = threads(S);
  static constexpr int kFirstDepth = kFirst ? first_depth(S) : kGroup;
  static constexpr int kFirstSteps = ceil_div(kFirstDepth, kGroup / 2), kFirstGroups = ceil_div(kFirstSteps, 2);
  static constexpr int kFirstTiles = kFirst ? first_tiles(S) : 1;
  static constexpr bool kFirstRegisters = !kFirst || first_in_registers(S);
  static constexpr int kFirstRows = S.tile.wgmma && kFirst ? first_rows(S) : 0;
  static constexpr int kWarpGroupsN = kProject ? warp_groups_n(S) : 1;
  static constexpr int kBlocks8 = L::kBlocks8;
  static constexpr int kPackedRow = padded_out(S) / 8 * kFragment;  // project's weights of a group

  // Whether a thread block works through many tiles; and whether its weights stay, or go by once for each.
  static constexpr bool kResident = S.tile.resident, kStay = weights_stay(S), kGoBy = kResident && !kStay;
  // Whether the next tile's input is fetched while the last chunk of this one is computed.
  static constexpr bool kFetchesAhead = kAhead || (!kFirst && S.depthwise) || kStreams || kPasses;

  static constexpr bool kWgmma = S.tile.wgmma, kFromRegisters = from_registers(S);
  static constexpr int kStages = stages(S), kEarly = kStages - 1;  // copies are asked for that many steps early

  // Whether a step's products run on while the next copies are asked for and waited for.
  static constexpr bool kMultipliesFirst = kWgmma && kStreams;
  static constexpr bool kApart = warpgroups_apart(S) && kBulkCopies;

  // Shared memory: what a warpgroup multiplies comes first, since it must start at a multiple of kFragment.
  static constexpr int kExchangeAt = 0;  // one a stage
  static constexpr int kMeansAt = kExchangeAt + buffers(S) * exchange_bytes(S);
  static constexpr int kPartsAt = kMeansAt + (S.mean ? means_bytes(S) : 0);
  static constexpr int kProjectAt = kPartsAt + (S.mean ? mean_parts_bytes(S) : 0);
  static constexpr int kInputAt = kProjectAt + weight_buffers(S) * project_chunk_bytes(S);
  static constexpr int kFirstAt = kInputAt + first_input_bytes(S);
  static constexpr int kHaloAt = kFirstAt + weight_buffers(S) * first_chunk_bytes(S);
  static constexpr int kStagedAt = kHaloAt + halo_buffers(S) * halo_bytes(S);
  static constexpr int kPlacesAt = kStagedAt + staged_bytes(S);
  static constexpr int kDepthwiseAt = kPlacesAt + places_bytes(S);
  static constexpr int kArrivalsAt = arrivals_at(S), kGivenUpAt = kArrivalsAt + 32;

  const Params& p;
  char* const shared;
  T place;
  int chunk0, chunk_step, steps;  // this block's chunks: chunk0, chunk0 + chunk_step, ...
  static constexpr bool kOneStep = block_chunks(S) == 1;
  T place_of_copies;  // the tile whose input is copied
  int phase = 0;      // steps of earlier tiles: buffers go on to alternate
  int reductions = 0;

  // `first`: where the pixels of this lane's tiles go in the halo plane, or in Y from the tile's corner on (negative:
  // nowhere), and their input fragments.
  int halo_offsets[kFirstTiles][2];
  // Where the same pixels (with wgmma, those that this thread copies) are in X, or in its staged part, from the corner
  // of the halo region on; negative where there is none. And where this thread's vectors of the staged part are in X.
  static constexpr bool kKeepsInputs = kPlaced && !kWgmma && (stages_input(S) || In::kWholePixels);
  static constexpr int kFirstCopies = kAhead && kWgmma ? ceil_div(kFirstRows * 4, kThreads) : 1;
  static constexpr bool kKeepsCopies = kAhead && kWgmma && In::kWholePixels && kFirstCopies <= 12;
  static constexpr bool kRemembers = remembers_places(S);  // in shared memory
  int input_offsets[kKeepsInputs && !kRemembers ? kFirstTiles : 1][2], first_copies[kKeepsCopies ? kFirstCopies : 1];
  int staged_vectors[stages_input(S) ? In::Staged::kEach : 1];
  typename L::Operand first_input[kFirstRegisters ? kFirstTiles : 1][kFirstRegisters ? kFirstGroups : 1];
  // What is loaded ahead of a tile is not touched before that tile begins, where it would be waited for; and not loaded
  // within a loop over chunks, where it would hold registers of its own all along.
  static constexpr bool kLoadsAhead =
      kKeepsInputs && kResident && kFirstRegisters && !stages_input(S) && !normalises(S);
  Vec loaded[kLoadsAhead ? kFirstTiles : 1][kLoadsAhead ? kFirstGroups : 1][2];
  // Without `first`: what this thread copies of the halo region, or the pixels of its fragments.
  static constexpr int kCopies =
      !kFirst && S.depthwise ? ceil_div(S.tile.images * halo_h(S) * halo_w(S) * 4, kThreads) : 1;
  static constexpr bool kCopiesKept = kCopies <= 12;
  int copy_to[kCopiesKept ? kCopies : 1], copy_from[kCopiesKept ? kCopies : 1], copy_image0 = 0;
  Pixel sources[!kFirst && !S.depthwise ? P : 1][2];
  static constexpr bool kScalesStream = kStreams && S.scaled;
  static constexpr bool kStreamsPixels = kStreams && S.project == Dense::pointwise && !S.scaled;
  // In place of `sources`; null where there is none. With a stride of 1 they follow one another: the first, and how
  // many there are from there on.
  static constexpr bool kInRow = kStreamsPixels && S.project_window.stride_h == 1 && S.project_window.stride_w == 1;
  const char* source_pixels[kStreamsPixels && !kInRow ? P : 1][2];
  int source_rows = 0;
  int factors_of[kScalesStream ? P : 1][2];  // the images of this tile's fragments

  float sums[P][kWarpGroupsN][kBlocks8][4];
  static constexpr bool kMomentsTaken = takes_moments(S);
  Moments<C> moments[kMomentsTaken ? P : 1];  // of X's channels, by patch row

  FCM_DEVICE explicit Module(const Params& params)
      : p(params), shared(shared_memory()), place(params, tile_of(0)), place_of_copies(place) {
    place_of_copies.images = 0;  // of no tile yet
    if constexpr (kProject) {
      chunk0 = S.tile.split > 1 ? block_z() : 0, chunk_step = S.tile.split;
      steps = ceil_div(chunks(S) - chunk0, chunk_step);
    } else {
      constexpr int kPerBlock = ceil_div(block_n(S), S.tile.chunk);
      chunk0 = block_y() * kPerBlock, chunk_step = 1;
      steps = chunks(S) % kPerBlock ? min(kPerBlock, chunks(S) - chunk0) : kPerBlock;
    }
  }

  // A thread block's tiles: its own, or of a depthwise, as many in a row as its share is; else those that all blocks
  // take together, one after another, so that what they write last lies together.
  static constexpr bool kInTurn = kResident && !S.depthwise;
  FCM_DEVICE int tiles_of() const {
    if constexpr (!kResident) return 1;
    const int blocks = grid_x(), each = p.tiles / blocks;
    return each + (block_x() < p.tiles - each * blocks ? 1 : 0);
  }
  FCM_DEVICE int tile_of(int i) const {
    if constexpr (!kResident) return block_x();
    const int blocks = grid_x(), each = p.tiles / blocks;
    return kInTurn ? block_x() + i * blocks : block_x() * each + min(block_x(), p.tiles - each * blocks) + i;
  }

  FCM_DEVICE int chunk(int step) const { return chunk0 + step * chunk_step; }
  FCM_DEVICE static int groups(int chunk) {
    // Products of a warpgroup must not depend on a branch: they take groups that pad a chunk as well, all of zeros.
    if constexpr (kWgmma || packed_groups(S) == middle_groups(S)) return kChunkGroups;
    return min(kChunkGroups, middle_groups(S) - chunk * kChunkGroups);
  }
  FCM_DEVICE char* halo_buffer(int step) const {
    return shared + kHaloAt + (halo_buffers(S) == 2 ? (phase + step) & 1 : 0) * halo_bytes(S);
  }
  FCM_DEVICE char* exchange_buffer(int step) const {
    return shared + kExchangeAt + stage(phase + step) * exchange_bytes(S);
  }
  FCM_DEVICE static int stage(int step) { return kStages == 2 ? step & 1 : step % kStages; }
  FCM_DEVICE int weight_buffer(int step) const { return kStay ? step : stage(kGoBy ? phase + step : step); }
  FCM_DEVICE char* first_buffer(int step) const {
    return shared + kFirstAt + weight_buffer(step) * first_chunk_bytes(S);
  }
  FCM_DEVICE char* depthwise_buffer(int step) const {
    return shared + kDepthwiseAt + weight_buffer(step) * depthwise_chunk_bytes(S);
  }
  FCM_DEVICE char* project_buffer(int step) const {
    return shared + kProjectAt + weight_buffer(step) * project_chunk_bytes(S);
  }
  // Fragment of patch row `py`, pixel `side`, of group gi in the exchange buffer.
  FCM_DEVICE static int exchange_offset(int gi, int py, int side) {
    return (((gi * P + py) * S.tile.warps_m + L::warp_m()) * 2 + side) * kFragment + swizzled(L::row(), L::column());
  }

  // ---- Copies

  // Weights: where the hardware can, one thread asks for all of them.
  template <int BYTES>
  FCM_DEVICE void copy(char* to, const void* from, int turn, bool asks = thread_index() == 0) const {
    if constexpr (kBulkCopies) {
      if (asks) bulk_copy(to, from, BYTES, arrivals(turn));
    } else {
      FCM_UNROLL
      for (int i = 0; i < BYTES; i += kThreads * 16) {
        const int at = i + thread_index() * 16;
        if (i + kThreads * 16 <= BYTES || at < BYTES) copy_async(to + at, (const char*)from + at);
      }
    }
  }
  template <bool SLOPE>
  FCM_DEVICE void copy_vectors(char* to, const float* bias, const float* slope, int chunk, int turn) const {
    copy<S.tile.chunk * 4>(to, bias + chunk * S.tile.chunk, turn);
    if constexpr (SLOPE) copy<S.tile.chunk * 4>(to + S.tile.chunk * 4, slope + chunk * S.tile.chunk, turn);
  }
  // Weights of chunk `step`, for the turn of copies `turn`.
  FCM_DEVICE void copy_first(int step, int turn) const {
    if constexpr (kFirst) {
      if (step < 0 || step >= steps) return;
      constexpr int kBytes = kChunkGroups * first_group_bytes(S);
      char* to = first_buffer(step);
      copy<kBytes>(to, (const char*)p.first_weight + (long long)chunk(step) * kBytes, turn);
      copy_vectors<S.first_act.kind == Activation::prelu>(to + kBytes, p.first_bias, p.first_slope, chunk(step), turn);
    }
  }
  FCM_DEVICE void copy_depthwise(int step, int turn) const {
    if constexpr (S.depthwise && !kPasses) {
      if (step < 0 || step >= steps) return;
      constexpr int kBytes = kChunkGroups * depthwise_group_bytes(S);
      char* to = depthwise_buffer(step);
      copy<kBytes>(to, (const char*)p.depthwise_weight + (long long)chunk(step) * kBytes, turn);
      copy_vectors<S.depthwise_act.kind == Activation::prelu>(to + kBytes, p.depthwise_bias, p.depthwise_slope,
                                                              chunk(step), turn);
    }
  }
  FCM_DEVICE void copy_project(int step, int turn) const {
    if (step >= 0 && step < steps) copy_project(chunk(step), step, turn, thread_index() == 0);
  }
  FCM_DEVICE void copy_project(int chunk, int step, int turn, bool asks) const {
    if constexpr (kProject) {
      constexpr int kRow = block_n(S) / 8 * kFragment;  // of a group, this block's channels
      const char* from =
          (const char*)p.project_weight + (long long)chunk * kChunkGroups * kPackedRow + block_y() * kRow;
      if constexpr (kRow == kPackedRow) {
        copy<kChunkGroups * kRow>(project_buffer(step), from, turn, asks);
      } else {  // the last block may have fewer channels
        const int bytes = min(kRow, kPackedRow - block_y() * kRow);
        for (int gi = 0; gi < kChunkGroups; ++gi) {
          char* to = project_buffer(step) + gi * kRow;
          if constexpr (kBulkCopies) {
            if (asks) bulk_copy(to, from + gi * kPackedRow, bytes, arrivals(turn));
          } else {
            for (int i = thread_index() * 16; i < bytes; i += kThreads * 16)
              copy_async(to + i, from + gi * kPackedRow + i);
          }
        }
      }
    }
  }
  // Whether a step reads less of a pixel than comes to L2 at once, and one soon after it the rest.
  static constexpr int kPixelBytes = S.c_in * L::kElement;
  static constexpr bool kReadsOn =
      kStreams && S.tile.chunk * L::kElement < kLinesAtOnce && kPixelBytes >= kLinesAtOnce &&
      (kPixelBytes % kLinesAtOnce == 0 || (S.project_window.stride_h == 1 && S.project_window.stride_w == 1));
  // X itself: the halo region of a chunk where the module starts with a depthwise, the fragments of a lone pointwise.
  // For the tile that find_input found; the buffers are those of `step` of this tile.
  FCM_DEVICE void copy_input(int chunk, int step) const {
    const int g = groups(chunk);
    if constexpr (!kFirst && S.depthwise) {
      const auto copy = [&](int i) {
        int to, from;
        if constexpr (kCopiesKept)
          to = copy_to[i], from = copy_from[i];
        else
          copy_place(place_of_copies, i, to, from);
        for (int gi = 0; gi < g; ++gi) {
          const int k = (chunk * kChunkGroups + gi) * kGroup + thread_index() % 4 * L::kLane;
          char* slot = halo_buffer(step) + gi * halo_plane_bytes(S) + to;
          if constexpr (vector_input(S)) {
            const char* x = (const char*)p.x + ((long long)copy_image0 * p.in_h * p.in_w * S.c_in + k) * L::kElement;
            const bool valid = from >= 0 && k < S.c_in;
            copy_async(slot, valid ? x + (long long)from * (S.c_in * L::kElement) : p.x, valid);
          } else {
            const int area = p.in_h * p.in_w, pixel = max(from, 0), image = pixel / area, rest = pixel - image * area;
            *(Vec*)slot = In::template load<Dense::none, L::kLane>(p, Window{}, copy_image0 + image, rest / p.in_w,
                                                                   rest % p.in_w, k, from >= 0);
          }
        }
      };
      if constexpr (kCopiesKept || vector_input(S)) {
        FCM_UNROLL
        for (int i = 0; i < kCopies; ++i) copy(i);
      } else {
        FCM_ROLL
        for (int i = 0; i < kCopies; ++i) copy(i);  // loads of single elements, all of them at once, would spill
      }
    }
    if constexpr (kStreams) {
      FCM_UNROLL
      for (int gi = 0; gi < kChunkGroups; ++gi) {
        if (gi % S.tile.warps_n != L::warp_n() || gi >= g) continue;
        const int k = (chunk * kChunkGroups + gi) * kGroup + L::column() * L::kLane;
        FCM_UNROLL
        for (int py = 0; py < P; ++py) {
          FCM_UNROLL
          for (int side = 0; side < 2; ++side) {
            bool valid;
            const char* from;
            if constexpr (kInRow) {
              constexpr int kPixel = S.c_in * L::kElement;
              valid = py * 16 + side * 8 < source_rows && k < S.c_in;
              from = source_pixels[0][0] + k * L::kElement + (py * 16 + side * 8) * kPixel;
            } else if constexpr (kStreamsPixels) {
              valid = source_pixels[py][side] && k < S.c_in, from = source_pixels[py][side] + k * L::kElement;
            } else {
              const Pixel& q = sources[py][side];
              valid = q.valid && k < middle_channels(S);
              from = valid ? In::stream_address(p, q.n, q.y, q.x, k, valid) : nullptr;
            }
            copy_async<kReadsOn>(exchange_buffer(step) + exchange_offset(gi, py, side), valid ? from : (const char*)p.x,
                                 valid);
          }
        }
      }
    }
  }
  // The i-th 16 bytes of each plane that this thread copies: offset in the plane; pixel from the tile's first image on,
  // negative outside of X.
  FCM_DEVICE void copy_place(const T& at, int i, int& to, int& from) const {
    constexpr int kRows = T::kHaloH, kColumns = S.depthwise ? halo_w(S) : 1;
    const int pixel = (thread_index() + i * kThreads) / 4, x = pixel % kColumns, y = pixel / kColumns % kRows;
    const int image = pixel / (kColumns * kRows), sy = at.halo_y() + y, sx = at.halo_x() + x;
    const bool valid = image < at.images && sy >= 0 && sy < p.in_h && sx >= 0 && sx < p.in_w;
    from = valid ? (image * p.in_h + sy) * p.in_w + sx : -1;
    const bool in_tile = image < S.tile.images;  // the last round of threads may go past it
    to = (in_tile ? T::halo_place(image, y, x) : halo_plane_bytes(S) - 128) + thread_index() % 4 * 16;
  }
  // Where this thread's input of a tile lies.
  FCM_DEVICE void find_input(const T& at) {
    if constexpr (kInRow) {
      const long long first = at.flat_pixel(L::warp_m(), 0, 0), pixels = (long long)p.out_h * p.out_w * p.batch;
      source_rows = (int)(pixels - first < flat_pixels(S) ? pixels - first : flat_pixels(S));
      source_pixels[0][0] = (const char*)p.x + first * (S.c_in * L::kElement);
    } else if constexpr (!kFirst && !S.depthwise) {
      FCM_UNROLL
      for (int py = 0; py < P; ++py) {
        FCM_UNROLL
        for (int side = 0; side < 2; ++side) {
          if constexpr (kStreamsPixels)
            source_pixels[py][side] = In::output_pixel(p, at, py, side);
          else
            sources[py][side] = at.output_pixel(p, L::warp_m(), py, side);
        }
      }
    }
    if constexpr (!kFirst && S.depthwise) {
      const bool known = kResident && kCopies <= 6 && at.same_place(place_of_copies);
      copy_image0 = at.image0, place_of_copies = at;
      if (kCopiesKept && !known) {
        FCM_UNROLL
        for (int i = 0; i < kCopies; ++i) copy_place(at, i, copy_to[i], copy_from[i]);
      }
    }
  }
  // The weights that step `step` needs, and those of what runs ahead of it: the turn of copies `step`.
  FCM_DEVICE void copy_weights(int step) const {
    copy_first(step + kAhead, step);
    copy_depthwise(step, step);
    copy_project(step - kLag, step);
    all_asked_for(step);
  }
  FCM_DEVICE char* arrivals(int turn) const { return shared + kArrivalsAt + stage(turn) * 8; }
  FCM_DEVICE char* received() const { return shared + kArrivalsAt + 3 * 8; }  // of a reduction
  FCM_DEVICE void all_asked_for(int turn, bool asks = thread_index() == 0) const {
    if constexpr (kBulkCopies)
      if (asks) bulk_asked_for(arrivals(turn));
  }
  FCM_DEVICE void wait_for_weights(int turn) const {
    if constexpr (kBulkCopies) bulk_wait(arrivals(turn), turn / kStages & 1);
  }

  // ---- Stages

  // Where the pixels of this lane's tiles of the halo region go. All tiles of which the same part lies on the map
  // agree.
  FCM_DEVICE void find_halo(const T& at) {
    if constexpr (kPlaced) {
      if constexpr (kRemembers) warp_sync();  // what is there is still read
      const int thread = anew(thread_index());
      FCM_UNROLL
      for (int i = 0; i < kFirstTiles; ++i) {
        const int tile = kWgmma ? first_row(i) + thread / 32 % 4 * 16 : first_tile(i, thread / 32) * 16;
        FCM_UNROLL
        for (int side = 0; side < 2; ++side) {
          const Pixel q = at.halo_pixel(tile + side * 8 + thread % 32 / 4);
          if constexpr (kPasses)
            halo_offsets[i][side] =
                q.valid ? (int)Out::place(p, q.n - at.image0, q.y - at.halo_y(), q.x - at.halo_x()) : -1;
          else
            halo_offsets[i][side] = at.halo_offset(q) + L::column() * 16;
          if constexpr (kKeepsInputs) {
            const int image = q.n - at.image0, y = q.y - at.halo_y(), x = q.x - at.halo_x();
            const int offset = stages_input(S) ? In::Staged::offset(image, y, x) : In::halo_offset(p, image, y, x);
            if constexpr (!kRemembers)
              input_offsets[i][side] = offset;
            else if (L::column() == 0)
              remembered(i)[side] = offset;
          }
        }
      }
      if constexpr (kRemembers) warp_sync();
    }
  }
  // Of this lane's two pixels of the i-th tile.
  FCM_DEVICE int* remembered(int i) const {
    return (int*)(shared + kPlacesAt + ((L::warp() * kFirstTiles + i) * 8 + L::row()) * 8);
  }
  // What is known of a tile's input, as long as it is of the same part of a map.
  FCM_DEVICE void find_first_input(const T& at) {
    find_halo(at);
    if constexpr (kKeepsCopies) {
      FCM_UNROLL
      for (int i = 0; i < kFirstCopies; ++i) first_copies[i] = first_copy(at, (i * kThreads + thread_index()) / 4);
    }
  }
  // Where the mean of an image of the tile lies: of the group-th group of this block's channels, lane column's.
  FCM_DEVICE static int mean_offset(int group, int image, int column) {
    constexpr int kRows = mean_rows(S);
    return kMeansAt + (group * kRows + (image < kRows ? image / 8 * 8 : 0)) * 64 + swizzled(image % 8, column);
  }
  FCM_DEVICE void average(const T& at) const {
    const int image0 = (int)at.pixel0, images = min(S.tile.images, p.batch - image0);
    Mean<C>::run(
        p, image0, images, steps * kChunkGroups * 4, (float*)(shared + kPartsAt),
        [&](int vector) {
          const int group = vector / 4;
          return (chunk(group / kChunkGroups) * kChunkGroups + group % kChunkGroups) * kGroup + vector % 4 * L::kLane;
        },
        [&](int image, int vector, int i, float mean) {
          L::put(shared + mean_offset(vector / 4, image, vector % 4) + i * L::kElement, mean);
        });
  }

  // What of X a tile of `first` multiplies.
  static constexpr bool kRounds = S.type == Type::tf32;
  FCM_DEVICE void settle(int i, int kg, const Vec& v0, const Vec& v1) {
    const typename L::Operand a = kKeepsInputs ? L::operands(L::operand(v0), L::operand(v1)) : L::operands(v0, v1);
    FCM_UNROLL
    for (int s = 0; s < 2; ++s) {
      if constexpr (kFirstRegisters) {
        FCM_UNROLL
        for (int r = 0; r < 4; ++r) {  // what has been rounded is in registers of its own
          first_input[i][kg].step[s].r[r] = kRounds ? a.step[s].r[r] : pinned(a.step[s].r[r], zero());
        }
      } else {
        *(Vec*)(shared + first_offset(i, kg, s)) = a.step[s];
      }
    }
  }
  FCM_DEVICE void settle_first_input() {
    if constexpr (kLoadsAhead) {
      FCM_UNROLL
      for (int i = 0; i < kFirstTiles; ++i) {
        FCM_UNROLL
        for (int kg = 0; kg < kFirstGroups; ++kg) settle(i, kg, loaded[i][kg][0], loaded[i][kg][1]);
      }
    }
  }
  FCM_DEVICE void load_first_input(const T& at) {
    if constexpr (kWgmma) {
      kFlatFirst ? load_flat_input(at) : copy_first_input(at);
      return;
    }
    [[maybe_unused]] const typename In::Staged staged(shared + kStagedAt, at.halo_x());
    [[maybe_unused]] const char* corner = kKeepsInputs && !stages_input(S) ? In::halo_corner(p, at) : nullptr;
    FCM_UNROLL
    for (int i = 0; i < kFirstTiles; ++i) {
      Pixel q[2]{};
      [[maybe_unused]] int offsets[2];
      FCM_UNROLL
      for (int side = 0; side < 2; ++side) {
        if constexpr (kKeepsInputs)
          offsets[side] = kRemembers ? remembered(i)[side] : input_offsets[i][side];
        else if constexpr (S.depthwise)
          q[side] = at.halo_pixel_at(halo_offsets[i][side]);
        else if constexpr (!S.depthwise)
          q[side] = at.output_pixel(p, L::warp_m(), i, side);
      }
      FCM_UNROLL
      for (int kg = 0; kg < kFirstGroups; ++kg) {
        Vec v[2];
        FCM_UNROLL
        for (int side = 0; side < 2; ++side) {
          if constexpr (stages_input(S))
            v[side] = staged.load(offsets[side], kg);
          else if constexpr (kKeepsInputs)
            v[side] = In::template load_pixel<kFirstDepth>(In::pixel_at(corner, offsets[side]), kg);
          else
            v[side] = In::template load_group<S.first, kFirstDepth>(p, S.first_window, q[side].n, q[side].y, q[side].x,
                                                                    kg, q[side].valid);
        }
        if constexpr (kLoadsAhead)
          loaded[i][kg][0] = v[0], loaded[i][kg][1] = v[1];
        else
          settle(i, kg, v[0], v[1]);
      }
      if constexpr (normalises(S) && kFirst) {
        Normalise<C>::template run<2>(
            [&](int kg) { return first_operand(i, kg); },
            [&](int kg, const Vec(&v)[2]) {
              const typename L::Operand a = L::operands(v[0], v[1]);
              if constexpr (kFirstRegisters)
                first_input[i][kg] = a;
              else
                *(Vec*)(shared + first_offset(i, kg, 0)) = a.step[0],
                                                     *(Vec*)(shared + first_offset(i, kg, 1)) = a.step[1];
            });
      }
    }
  }
  // The i-th tile of this warp, and which groups of it.
  static constexpr int kFirstShares = kFirst ? first_shares(S) : 1,
                       kSharers = kFirstShares > 1 ? first_rows(S) / 16 : warps(S);
  FCM_DEVICE static int first_tile(int i, int warp = L::warp()) { return warp % kSharers + i * kSharers; }
  FCM_DEVICE static int first_share() { return kFirstShares > 1 ? L::warp() / kSharers : 0; }
  // Zero, which the compiler cannot know; or another, to tell apart what is the same.
  FCM_DEVICE u32 zero(bool other = false) const { return (u32)((other ? p.in_h : p.batch) >> 31); }
  // Written and read by the same lane.
  FCM_DEVICE static int first_offset(int i, int kg, int step) {
    return kInputAt + (((L::warp() * kFirstTiles + i) * kFirstGroups + kg) * 2 + step) * kFragment + L::lane() * 16;
  }
  FCM_DEVICE typename L::Operand first_operand(int i, int kg) const {
    if constexpr (kFirstRegisters) return first_input[i][kg];
    return {{*(const Vec*)(shared + first_offset(i, kg, 0)), *(const Vec*)(shared + first_offset(i, kg, 1))}};
  }

  // A group's bias, as products start at it, and its weights where they are few and many tiles need them, in registers.
  static constexpr bool kKeepsWeights =
      (kFirstGroups == 1 || (stages_input(S) && kFirstGroups * kBlocks8 <= 4)) && S.depthwise && kFirstTiles > 2;
  struct FirstGroup {
    float bias[kBlocks8][4];
    Vec weights[kKeepsWeights ? kBlocks8 : 1][kKeepsWeights ? kFirstGroups : 1];
  };
  FCM_DEVICE FirstGroup first_group(const char* buffer, int gi) const {
    FirstGroup kept;
    const float* bias =
        (const float*)(buffer + kChunkGroups * first_group_bytes(S)) + gi * kGroup + L::column() * L::kLane;
    L::start(kept.bias, bias);
    FCM_UNROLL
    for (int j = 0; j < kBlocks8; ++j) {
      FCM_UNROLL
      for (int i = 0; i < 4; ++i)
        kept.bias[j][i] = bits_float(pinned(float_bits(kept.bias[j][i]), zero(!L::kHalf && i > 1)));
    }
    if constexpr (kKeepsWeights) {
      FCM_UNROLL
      for (int j = 0; j < kBlocks8; ++j) {
        FCM_UNROLL
        for (int kg = 0; kg < kFirstGroups; ++kg) kept.weights[j][kg] = first_weights(buffer, gi, j, kg);
      }
    }
    return kept;
  }
  static constexpr bool half_first(int kg) { return kFirstSteps % 2 && kg == kFirstSteps / 2; }
  FCM_DEVICE static Vec first_weights(const char* buffer, int gi, int j, int kg) {
    const char* product = buffer + ((gi * kBlocks8 + j) * kFirstSteps + kg * 2) * 256;
    return half_first(kg) ? L::template weights<1>(product) : L::template weights<2>(product);
  }
  // Products of group gi of the chunk in `buffer` for COUNT tiles from tile i on.
  template <int COUNT>
  FCM_DEVICE void first_products(float (&c)[COUNT][kBlocks8][4], int i, const char* buffer, int gi,
                                 const FirstGroup& kept) const {
    FCM_UNROLL
    for (int m = 0; m < COUNT; ++m) {
      FCM_UNROLL
      for (int j = 0; j < kBlocks8; ++j) {
        FCM_UNROLL
        for (int r = 0; r < 4; ++r) c[m][j][r] = kept.bias[j][r];
      }
    }
    FCM_UNROLL
    for (int kg = 0; kg < kFirstGroups; ++kg) {
      typename L::Operand a[COUNT];
      FCM_UNROLL
      for (int m = 0; m < COUNT; ++m) a[m] = first_operand(i + m, kg);
      FCM_UNROLL
      for (int j = 0; j < kBlocks8; ++j) {
        const Vec b = kKeepsWeights ? kept.weights[j][kg] : first_weights(buffer, gi, j, kg);
        FCM_UNROLL
        for (int m = 0; m < COUNT; ++m) {
          if (half_first(kg))
            L::template multiply<1>(c[m][j], a[m], b);
          else
            L::template multiply<2>(c[m][j], a[m], b);
        }
      }
    }
  }
  FCM_DEVICE const float* first_slope(const char* buffer, int gi) const {
    return (const float*)(buffer + kChunkGroups * first_group_bytes(S)) + S.tile.chunk + gi * kGroup +
           L::column() * L::kLane;
  }

  // The middle tensor of a chunk on the halo region, or Y.
  FCM_DEVICE void first_to_halo(int step) const {
    const char* buffer = first_buffer(step);
    const int g = groups(chunk(step)), tiles = ceil_div(place.halo_pixels(), 16);
    if (first_share() >= kFirstShares) return;
    for (int gi = first_share(); gi < g; gi += kFirstShares) {
      const FirstGroup kept = first_group(buffer, gi);
      FCM_UNROLL
      for (int i = 0; i < kFirstTiles; i += 2) {
        constexpr int kPair = kFirstTiles > 1 ? 2 : 1;
        if (first_tile(i) >= tiles) break;
        if (kPair == 2 && i + 1 < kFirstTiles && first_tile(i + 1) < tiles)
          first_tiles_to_halo<kPair>(i, step, gi, kept);
        else
          first_tiles_to_halo<1>(i, step, gi, kept);
      }
    }
  }
  template <int COUNT>
  FCM_DEVICE void first_tiles_to_halo(int i, int step, int gi, const FirstGroup& kept) const {
    const char* buffer = first_buffer(step);
    float c[COUNT][kBlocks8][4];
    first_products<COUNT>(c, i, buffer, gi, kept);
    FCM_UNROLL
    for (int m = 0; m < COUNT; ++m) {
      FCM_UNROLL
      for (int side = 0; side < 2; ++side) {
        const Vec v = L::pack(c[m], side, S.first_act, first_slope(buffer, gi));
        const int offset = halo_offsets[i + m][side];
        if constexpr (kPasses)
          Out::store_vector(p, {Out::place(p, place.image0, place.y0, place.x0) + offset, offset >= 0},
                            (chunk(step) * kChunkGroups + gi) * kGroup + L::column() * L::kLane, v);
        else
          *(Vec*)(halo_buffer(step) + gi * halo_plane_bytes(S) + offset) = v;
      }
    }
  }

  // ---- Products of warpgroups

  static constexpr int kWarpgroups = kThreads / 128;
  static constexpr int kFirstN = kChunkGroups * kGroup;
  // Tiles of `first` whose results are in registers at once.
  static constexpr int kBatch = min(kFirstTiles, max(1, 64 / (kFirstN / 2)));

  FCM_DEVICE static int warpgroup() { return warp_uniform(thread_index() / 128); }
  FCM_DEVICE static int first_row(int i) { return (warpgroup() + i * kWarpgroups) * 64; }

  FCM_DEVICE char* first_place(int kg, int row, int column) const {
    return shared + kInputAt + (kg * kFirstRows + row / 8 * 8) * 64 + swizzled(row % 8, column);
  }
  // X under the halo region: of each group of channels, a row of 64 bytes a pixel.
  FCM_DEVICE void copy_first_input(const T& at) {
    if constexpr (kAhead && kWgmma) {
      const int rows = round_up(at.halo_pixels(), 64), column = thread_index() % 4;
      [[maybe_unused]] const char* const corner = In::halo_corner(p, at);
      FCM_UNROLL
      for (int i = 0; i < kFirstCopies; ++i) {
        const int row = (i * kThreads + thread_index()) / 4;
        if (row >= rows) break;
        FCM_UNROLL
        for (int kg = 0; kg < kFirstGroups; ++kg) {
          const int k = kg * kGroup + column * L::kLane;
          char* to = first_place(kg, row, column);
          if constexpr (vector_input(S)) {
            const int offset = kKeepsCopies ? first_copies[i] : first_copy(at, row);
            const bool valid = offset >= 0 && k < S.c_in;
            copy_async(to, valid ? In::pixel_at(corner, offset) + k * L::kElement : (const char*)p.x, valid);
          } else {
            const Pixel q = at.halo_pixel(row);
            *(Vec*)to = In::template load<S.first, L::kLane>(p, S.first_window, q.n, q.y, q.x, k, q.valid);
          }
        }
      }
    }
  }
  FCM_DEVICE int first_copy(const T& at, int row) const {
    const Pixel q = at.halo_pixel(row);
    return q.valid ? In::halo_offset(p, q.n - at.image0, q.y - at.halo_y(), q.x - at.halo_x()) : -1;
  }
  // Without a depthwise, warpgroups multiply the same pixels twice: each lane loads its own channels, of all groups, to
  // where they lie in a row block, and later puts the result of their products in the same place of an exchange buffer.
  static constexpr bool kFlatFirst = kWgmma && kFirst && !S.depthwise;
  static constexpr int kShare =
      kFlatFirst ? kChunkGroups / S.tile.warps_n : 1;  // groups of a chunk that a warp computes
  FCM_DEVICE void load_flat_input(const T& at) const {
    if constexpr (kFlatFirst) {
      FCM_UNROLL
      for (int i = 0; i < 2 * P; ++i) {
        if (i % S.tile.warps_n != L::warp_n()) continue;
        const Pixel q = at.output_pixel(p, L::warp_m(), i / 2, i % 2);
        FCM_UNROLL
        for (int kg = 0; kg < kFirstGroups; ++kg)
          *(Vec*)flat_input(kg, i) = In::template load<S.first, L::kLane>(
              p, S.first_window, q.n, q.y, q.x, kg * kGroup + L::column() * L::kLane, q.valid);
        if constexpr (normalises(S)) {
          Normalise<C>::template run<1>([&](int kg) { return L::operands(*(const Vec*)flat_input(kg, i), Vec{}); },
                                        [&](int kg, const Vec(&v)[1]) { *(Vec*)flat_input(kg, i) = v[0]; });
        }
      }
    }
  }
  FCM_DEVICE char* flat_input(int kg, int i) const { return shared + kInputAt + exchange_offset(kg, i / 2, i % 2); }
  FCM_DEVICE void start_flat_first(float (&c)[P][kShare][kBlocks8][4], int step) const {
    const int g0 = L::warp_n() * kShare;
    const char* buffer = first_buffer(step);
    const float* bias =
        (const float*)(buffer + kChunkGroups * first_group_bytes(S)) + g0 * kGroup + L::column() * L::kLane;
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int gi = 0; gi < kShare; ++gi) L::start(c[py][gi], bias + gi * kGroup);
    }
    wgmma_fence(c);
    const char* weights = buffer + warpgroup() / (S.tile.warps_m / 4) * kShare * first_group_bytes(S);
    const char* rows = shared + kInputAt + warpgroup() % (S.tile.warps_m / 4) * 8 * kFragment;
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int s = 0; s < kFirstSteps; ++s)
        wgmma<S.type, kShare * kGroup>(&c[py][0][0][0], rows + (s / 2 * P + py) * S.tile.warps_m * 2 * kFragment,
                                       weights + s / 2 * kFragment, kFirstGroups * kFragment, s % 2);
    }
    wgmma_commit();
  }
  FCM_DEVICE void finish_flat_first(const float (&c)[P][kShare][kBlocks8][4], int step) const {
    const char* buffer = first_buffer(step);
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int i = 0; i < kShare; ++i) {
        const int gi = L::warp_n() * kShare + i;
        FCM_UNROLL
        for (int side = 0; side < 2; ++side)
          *(Vec*)(exchange_buffer(step) + exchange_offset(gi, py, side)) =
              L::operand(L::pack(c[py][i], side, S.first_act, first_slope(buffer, gi)));
      }
    }
  }

  // Copies bring X as it is: where a warpgroup reads floats, each thread rounds what it has copied, once it is there.
  FCM_DEVICE void round_first_input() const {
    if constexpr (kFirst && S.type == Type::tf32 && vector_input(S)) {
      const int vectors = round_up(place.halo_pixels(), 64) * 4;
      for (int i = thread_index(); i < vectors; i += kThreads) {
        FCM_UNROLL
        for (int kg = 0; kg < kFirstGroups; ++kg) {
          Vec* const at = (Vec*)first_place(kg, i / 4, i % 4);
          *at = L::operand(*at);
        }
      }
    }
  }
  // Starts the products of chunk `step` for the tiles of a batch.
  FCM_DEVICE void start_first(float (&c)[kBatch][kChunkGroups][kBlocks8][4], int i0, int step) const {
    const char* buffer = first_buffer(step);
    const float* bias = (const float*)(buffer + kChunkGroups * first_group_bytes(S)) + L::column() * L::kLane;
    FCM_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      FCM_UNROLL
      for (int gi = 0; gi < kChunkGroups; ++gi) L::start(c[m][gi], bias + gi * kGroup);
    }
    wgmma_fence(c);
    FCM_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      const int row = min(first_row(i0 + m), kFirstRows - 64);  // what is beyond has no place to go
      FCM_UNROLL
      for (int s = 0; s < kFirstSteps; ++s)
        wgmma<S.type, kFirstN>(&c[m][0][0][0], shared + kInputAt + (s / 2 * kFirstRows + row) * 64,
                               buffer + s / 2 * kFragment, kFirstGroups * kFragment, s % 2);
    }
    wgmma_commit();
  }
  FCM_DEVICE void finish_first(const float (&c)[kBatch][kChunkGroups][kBlocks8][4], int i0, int step) const {
    const char* buffer = first_buffer(step);
    FCM_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      if (i0 + m >= kFirstTiles || first_row(i0 + m) >= place.halo_pixels()) continue;  // its rows are not copied
      FCM_UNROLL
      for (int gi = 0; gi < kChunkGroups; ++gi) {
        FCM_UNROLL
        for (int side = 0; side < 2; ++side)
          *(Vec*)(halo_buffer(step) + gi * halo_plane_bytes(S) + halo_offsets[i0 + m][side]) =
              L::pack(c[m][gi], side, S.first_act, first_slope(buffer, gi));
      }
    }
  }
  // Whether the next group's operands come to the registers that these products read: where 12 warps have no others,
  // and where a step has one group and nothing else waits for products between steps.
  static constexpr bool kOneSet = S.tile.warps_m > 8 || (kApart && kChunkGroups == 1);
  static constexpr int kSets = kOneSet ? 1 : kChunkGroups;
  // Starts the products of the fragments in the exchange buffer.
  FCM_DEVICE void start_project(int step) {
    constexpr int kN = block_n(S) / S.tile.warps_n;
    const char* fragments = exchange_buffer(step) + warpgroup() % (S.tile.warps_m / 4) * 8 * kFragment;
    const char* weights = project_buffer(step) + warpgroup() / (S.tile.warps_m / 4) * (kN / 8) * kFragment;
    if constexpr (!kFromRegisters) wgmma_fence(sums);
    FCM_UNROLL
    for (int gi = 0; gi < kChunkGroups; ++gi) {
      [[maybe_unused]] typename L::Operand own[P];
      if constexpr (kFromRegisters) {
        exchanged(own, step, gi);
        add_moments(own);
        wgmma_fence(sums);
      }
      FCM_UNROLL
      for (int s = 0; s < 2; ++s) {
        FCM_UNROLL
        for (int py = 0; py < P; ++py) {
          float* const d = &sums[py][0][0][0];
          const char* const b = weights + gi * (block_n(S) / 8) * kFragment;
          if constexpr (kFromRegisters) {
            wgmma<S.type, kN>(d, own[py].step[s], b, kFragment, s, gi % kSets * P + py);
          } else {
            wgmma<S.type, kN>(d, fragments + (gi * P + py) * S.tile.warps_m * 2 * kFragment, b, kFragment, s);
          }
        }
      }
      if constexpr (kFromRegisters) {  // while these run, the next group's registers are filled, where there are any
        wgmma_commit();
        wgmma_wait_for_operands<kOneSet ? 0 : 1>();
      }
    }
    if constexpr (!kFromRegisters) wgmma_commit();
  }
  // The products of a step: of `first` for the chunk after it; of `project` for the chunk before it, begun.
  FCM_DEVICE void multiply(int step) {
    if constexpr (kFlatFirst) {
      // Of this chunk, whose activation is computed while the products of `project` for the chunk before it run.
      if (step == 0) {
        float c[P][kShare][kBlocks8][4];
        start_flat_first(c, step);
        wgmma_wait<0>(c);
        finish_flat_first(c, step);
      } else if (step < steps) {
        float c[P][kShare][kBlocks8][4];
        start_flat_first(c, step);
        start_project(step - kLag);
        wgmma_wait<1>(c);
        finish_flat_first(c, step);
        wgmma_wait<0>(sums);
      } else {
        start_project(step - kLag);
        wgmma_wait<0>(sums);
      }
      return;
    }
    if constexpr (kFirst && S.depthwise) {
      if (step + 1 < steps) {
        FCM_UNROLL
        for (int i = 0; i < kFirstTiles; i += kBatch) {
          if (first_row(i) >= place.halo_pixels()) break;
          float c[kBatch][kChunkGroups][kBlocks8][4];
          start_first(c, i, step + 1);
          wgmma_wait<0>(c);
          finish_first(c, i, step + 1);
        }
      }
    }
    if constexpr (kProject)
      if (step >= kLag) start_project(step - kLag);
  }

  // The same where warpgroups are apart; of the step before, products are done and its copies' places free.
  FCM_DEVICE void multiply_apart(int step, int i, int tiles) {
    if constexpr (!kFromRegisters) {  // else a lane multiplies what it has copied itself
      wgmma_reads();
      warpgroup_sync();
    }
    start_project(step);
    wgmma_wait_for_operands<1>();
    if (step > 0) give_up(i, tiles, step - 1);
    if constexpr (!kFromRegisters) warpgroup_sync();
  }

  // What `project` multiplies, of group gi of a chunk: this lane's channels of its pixels.
  FCM_DEVICE void fragments(Vec (&d)[P][2], int step, int gi) const {
    if constexpr (S.depthwise) {
      const typename T::Patch q = place.patch(L::warp_m());
      constexpr Window w = S.depthwise_window;
      const char* halo = halo_buffer(step) + gi * halo_plane_bytes(S) +
                         ((q.image * T::kHaloH + q.y * w.stride_h) * T::kPitch + q.x * w.stride_w) * 64 +
                         L::column() * 16;
      const int side = T::kShift < 31 ? q.x / 2 & 1 : 0;
      const char* buffer = depthwise_buffer(step);
      const float* bias =
          (const float*)(buffer + kChunkGroups * depthwise_group_bytes(S)) + gi * kGroup + L::column() * L::kLane;
      Depthwise<C>::run(d, halo, side, buffer + gi * depthwise_group_bytes(S) + L::column() * 16, bias,
                        bias + S.tile.chunk, p.batch <= 0);
    } else if constexpr (kFirst) {
      const char* buffer = first_buffer(step);
      const FirstGroup kept = first_group(buffer, gi);
      FCM_UNROLL
      for (int py = 0; py < P; ++py) {
        float c[1][kBlocks8][4];
        first_products<1>(c, py, buffer, gi, kept);
        FCM_UNROLL
        for (int side = 0; side < 2; ++side) d[py][side] = L::pack(c[0], side, S.first_act, first_slope(buffer, gi));
      }
    } else if constexpr (S.mean) {
      FCM_UNROLL
      for (int py = 0; py < P; ++py) {
        FCM_UNROLL
        for (int side = 0; side < 2; ++side) {
          const int rows8 = (L::warp_m() * P + py) * 2 + side;  // beyond the images, the first stand in
          d[py][side] =
              *(const Vec*)(shared + mean_offset(step * kChunkGroups + gi, rows8 * 8 + L::row(), L::column()));
        }
      }
    } else if constexpr (!kStreams) {
      const int k = (chunk(step) * kChunkGroups + gi) * kGroup + L::column() * L::kLane;
      FCM_UNROLL
      for (int py = 0; py < P; ++py) {
        FCM_UNROLL
        for (int side = 0; side < 2; ++side) {
          const Pixel& q = sources[py][side];
          d[py][side] = In::template load<S.project, L::kLane>(p, S.project_window, q.n, q.y, q.x, k, q.valid);
        }
      }
    }
  }

  FCM_DEVICE void project(typename L::Operand (&a)[P], int step, int gi) {
    add_moments(a);
    if constexpr (kExchanges && kBulkCopies) {  // what was loaded as it is; before sm_90 some tiles would spill
      FCM_UNROLL
      for (int py = 0; py < P; ++py) {
        FCM_UNROLL
        for (int s = 0; s < 2; ++s) {
          FCM_UNROLL
          for (int r = 0; r < 4; ++r) a[py].step[s].r[r] = pinned(a[py].step[s].r[r], zero());
        }
      }
    }
    const char* buffer = project_buffer(step) + gi * (block_n(S) / 8) * kFragment;
    constexpr int kBlocks = block_n(S) / 8;
    constexpr bool kOneWarp = S.tile.warps_n == 1;  // along output channels
    constexpr int kProducts = kOneWarp ? kBlocks : kWarpGroupsN * kBlocks8;
    constexpr bool kExact = kBlocks == S.tile.warps_n * kProducts;  // else some warps have fewer
    // Weights are asked for ahead. Behind a depthwise, loading all of a group's at once, or before its end, spills:
    // branches that are never taken keep them apart.
    constexpr bool kApart = S.depthwise && !kFirst;
    const int base = kOneWarp && !kApart ? 0 : L::warp_n() * kProducts;
    const auto load = [&](int i) {
      const int block8 = base + i;
      return L::template weights<2>(buffer + (kExact ? block8 : min(block8, kBlocks - 1)) * kFragment);
    };
    if (kAhead && zero()) return;
    Vec next = load(0);
    FCM_UNROLL
    for (int i = 0; i < kProducts; ++i) {
      if ((!kExact || kApart) && base + i >= kBlocks) break;
      const Vec b = next;
      if (i + 1 < kProducts) next = load(i + 1);
      FCM_UNROLL
      for (int py = 0; py < P; ++py) L::template multiply<2>(sums[py][i / kBlocks8][i % kBlocks8], a[py], b);
    }
  }

  FCM_DEVICE void add_moments(const typename L::Operand (&a)[P]) {
    if constexpr (kMomentsTaken) {
      FCM_UNROLL
      for (int py = 0; py < P; ++py) moments[py].add(a[py]);
    }
  }
  // The same of what warpgroups multiply meanwhile.
  FCM_DEVICE void add_exchanged_moments(int step) {
    for (int gi = 0; gi < kChunkGroups; ++gi) {
      typename L::Operand a[P];
      exchanged(a, step, gi);
      add_moments(a);
    }
  }

  // Computes the fragments of a chunk and uses them: products at once, or the exchange buffer, or Y.
  FCM_DEVICE void produce(int step) {
    const int g = groups(chunk(step));
    for (int gi = kExchanges ? L::warp_n() : 0; gi < g; gi += kExchanges ? S.tile.warps_n : 1) {
      Vec d[P][2];
      fragments(d, step, gi);
      if constexpr (!kProject) {
        FCM_UNROLL
        for (int py = 0; py < P; ++py) {
          FCM_UNROLL
          for (int side = 0; side < 2; ++side)
            Out::store_vector(p, Out::find(p, place, L::warp_m(), py, side),
                              (chunk(step) * kChunkGroups + gi) * kGroup + L::column() * L::kLane, d[py][side]);
        }
        if constexpr (S.pool)
          Pool<C>::store(p, place, d, (chunk(step) * kChunkGroups + gi) * kGroup + L::column() * L::kLane);
      } else if constexpr (kExchanges) {
        FCM_UNROLL
        for (int py = 0; py < P; ++py) {
          FCM_UNROLL
          for (int side = 0; side < 2; ++side)
            *(Vec*)(exchange_buffer(step) + exchange_offset(gi, py, side)) =
                kWgmma ? L::operand(d[py][side]) : d[py][side];
        }
      } else {
        typename L::Operand a[P];
        operands(a, d);
        project(a, step, gi);
      }
    }
  }
  // This lane's part of group gi in the exchange buffer.
  FCM_DEVICE void exchanged(typename L::Operand (&a)[P], int step, int gi) const {
    const int k = (chunk(step) * kChunkGroups + gi) * kGroup + L::column() * L::kLane;
    Vec d[P][2];
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int side = 0; side < 2; ++side) {
        d[py][side] = *(const Vec*)(exchange_buffer(step) + exchange_offset(gi, py, side));
        if constexpr (kScalesStream)
          d[py][side] = In::template scale<L::kLane>(p, d[py][side], factors_of[py][side], k);
      }
    }
    operands(a, d);
  }
  FCM_DEVICE static void operands(typename L::Operand (&a)[P], const Vec (&d)[P][2]) {
    FCM_UNROLL
    for (int py = 0; py < P; ++py) a[py] = L::operands(L::operand(d[py][0]), L::operand(d[py][1]));
  }
  FCM_DEVICE void project_exchanged(int step) {
    const int g = groups(chunk(step));
    for (int gi = 0; gi < g; ++gi) {
      typename L::Operand a[P];
      exchanged(a, step, gi);
      project(a, step, gi);
    }
  }

  // ---- The end

  // COUNT groups of products in row `py` of a warp's pixels, from group `ng` on: where they go (channels from `channel`
  // to `end`, where the block's may end before the warp's), and what is loaded ahead.
  template <int COUNT>
  struct Stored {
    typename Out::Place pixels[2];
    int warp_m, py, channel, end;
    typename Out::template Ahead<COUNT> ahead;
  };
  template <int COUNT>
  FCM_DEVICE Stored<COUNT> find_stored(int warp, int py, int ng) const {
    const int warp_m = warp % S.tile.warps_m, warp_n = S.tile.warps_n > 1 ? warp / S.tile.warps_m : 0;
    int start = blocks_n(S) > 1 ? block_y() * block_n(S) : 0;
    if constexpr (kGoBy) start = anew(start);  // where channels lie would be held in registers beside the products
    Stored<COUNT> to{{Out::find(p, place, warp_m, py, 0), Out::find(p, place, warp_m, py, 1)},
                     warp_m,
                     py,
                     start + (warp_n * kWarpGroupsN + ng) * kGroup,
                     min(start + block_n(S), padded_out(S)),
                     {}};
    to.ahead = Out::template load_ahead<COUNT>(p, to.pixels, to.channel, to.end);
    return to;
  }
  template <int COUNT>
  FCM_DEVICE void store_sums(const Stored<COUNT>& to, const float (&c)[COUNT][kBlocks8][4]) const {
    typename Pool<C>::Flat flat;
    if constexpr (S.pool && !S.depthwise) flat = Pool<C>::find(p, place, to.warp_m, to.py);
    const auto pool = [&](const auto& x, int channel) {
      if constexpr (S.depthwise)
        Pool<C>::store(p, place, to.warp_m, to.py, x, channel);
      else
        Pool<C>::store(p, place, flat, x, channel);
    };
    Out::template store_groups<COUNT>(p, to.pixels, to.channel, to.end, c, to.ahead, pool);
  }
  FCM_DEVICE void store_all() {
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      if constexpr (kMomentsTaken) {
        const Vec total = moments[py].gather();
        FCM_UNROLL
        for (int ng = 0; ng < kWarpGroupsN; ++ng) Moments<C>::scale(sums[py][ng], total);
      }
      store_row<0>(py, find_stored<row_groups(0)>(L::warp(), py, 0));
    }
  }
  // Groups from NG on, of which `to` are the first.
  template <int NG, int COUNT>
  FCM_DEVICE void store_row(int py, const Stored<COUNT>& to) const {
    constexpr int kNext = row_groups(NG + COUNT);
    const auto& c = *(const float (*)[COUNT][kBlocks8][4])sums[py][NG];
    if constexpr (kNext > 0 && kFew) {
      const auto next = find_stored<kNext>(L::warp(), py, NG + COUNT);
      store_sums<COUNT>(to, c);
      store_row<NG + COUNT>(py, next);
    } else {
      store_sums<COUNT>(to, c);
      if constexpr (kNext > 0) store_row<NG + COUNT>(py, find_stored<kNext>(L::warp(), py, NG + COUNT));
    }
  }
  // How many groups' biases and residuals are asked for together: one, and the next before it is stored, where sums of
  // Y need registers, or where more than 8 warps leave few.
  static constexpr bool kFew = S.pool || (S.tile.wgmma && (kGoBy || (S.tile.warps_m > 8 && !S.residual)));
  static constexpr int row_groups(int ng) { return min(kWarpGroupsN - ng, kFew ? 1 : 4); }
  // Adds the sums of the cluster's blocks. A unit, a group's products of 16 pixels, goes to the block that stores it.
  FCM_DEVICE void reduce_and_store(bool more) {
    constexpr int kUnits = warps(S) * P * kWarpGroupsN, kOwn = ceil_div(reduction_units(S), warps(S));
    const auto own = [](int i) { return block_z() + S.tile.split * (L::warp() + i * warps(S)); };
    const auto stored = [this](int u) {
      u = min(u, kUnits - 1);
      return find_stored<1>(u / (P * kWarpGroupsN), u / kWarpGroupsN % P, u % kWarpGroupsN);
    };
    if constexpr (!kResident) cluster_give_up();  // else what is written now was free before
    if (thread_index() == 0) {
      const int units = (kUnits - block_z() + S.tile.split - 1) / S.tile.split;
      cluster_expect(received(),
                     S.tile.split * (units * kBlocks8 * kFragment + (kMomentsTaken ? moments_bytes(S) : 0)));
    }
    Stored<1> to[kOwn];
    FCM_UNROLL
    for (int i = 0; i < kOwn; ++i) to[i] = stored(own(i));
    cluster_wait();
    FCM_UNROLL
    for (int py = 0; py < P; ++py) {
      FCM_UNROLL
      for (int ng = 0; ng < kWarpGroupsN; ++ng) {
        const int u = (L::warp() * P + py) * kWarpGroupsN + ng;
        FCM_UNROLL
        for (int j = 0; j < kBlocks8; ++j) {
          const float (&c)[4] = sums[py][ng][j];
          cluster_send(reduction(u / S.tile.split, block_z(), j), received(), u % S.tile.split,
                       Vec{{float_bits(c[0]), float_bits(c[1]), float_bits(c[2]), float_bits(c[3])}});
        }
      }
      if constexpr (kMomentsTaken) {
        const Vec sum = moments[py].gather();
        if (L::warp_n() == 0 && L::column() == 0)
          for (int rank = 0; rank < S.tile.split; ++rank)
            cluster_send(reduced_moments(block_z(), L::warp_m(), py), received(), rank, sum);
      }
    }
    cluster_wait_for(received(), reductions++ & 1);
    FCM_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (own(i) >= kUnits) break;
      float c[1][kBlocks8][4] = {};
      FCM_UNROLL
      for (int rank = 0; rank < S.tile.split; ++rank) {
        FCM_UNROLL
        for (int j = 0; j < kBlocks8; ++j) {
          const Vec v = *(const Vec*)reduction(L::warp() + i * warps(S), rank, j);
          FCM_UNROLL
          for (int k = 0; k < 4; ++k) c[0][j][k] += bits_float(v.r[k]);
        }
      }
      if constexpr (kMomentsTaken) {
        const int u = min(own(i), kUnits - 1);
        Vec total{};
        FCM_UNROLL
        for (int rank = 0; rank < S.tile.split; ++rank) {
          const Vec part =
              *(const Vec*)reduced_moments(rank, u / (P * kWarpGroupsN) % S.tile.warps_m, u / kWarpGroupsN % P);
          FCM_UNROLL
          for (int k = 0; k < 4; ++k) total.r[k] = float_bits(bits_float(total.r[k]) + bits_float(part.r[k]));
        }
        Moments<C>::scale(c[0], total);
      }
      store_sums<1>(to[i], c);
    }
    if (kResident && more) cluster_give_up();
  }
  // Where this lane's share of block `rank`'s products lies, of the `unit`-th that a block stores.
  FCM_DEVICE char* reduction(int unit, int rank, int j) const {
    return shared + reduction_at(S) + ((unit * S.tile.split + rank) * kBlocks8 + j) * kFragment + L::lane() * 16;
  }
  // Block `rank`'s sums of X's channels, of a warp's pixels in row py.
  FCM_DEVICE char* reduced_moments(int rank, int warp_m, int py) const {
    return shared + reduction_at(S) + sums_bytes(S) + rank * moments_bytes(S) + (warp_m * P + py) * kMoments +
           L::row() * 16;
  }

  // Weights that `step` of the i-th tile multiplies or, where that is beyond its last, a step of one that follows.
  FCM_DEVICE void copy_weights_on(int i, int tiles, int step, bool asks) const {
    const int ahead = step / steps, turn = phase + step;
    if (i + ahead >= tiles) return;
    copy_project(chunk(step - ahead * steps), step, turn, asks);
    all_asked_for(turn, asks);
  }
  // This warp has multiplied what was copied for `step` of the i-th tile.
  FCM_DEVICE void give_up(int i, int tiles, int step) const {
    if constexpr (kApart && kGoBy) {
      if (L::lane() == 0 && is_last(shared + kGivenUpAt + stage(phase + step) * 4, warps(S)))
        copy_weights_on(i, tiles, step + kStages, true);
      warp_sync();
    }
  }
  // All that such a step multiplies.
  FCM_DEVICE void copy_on(int i, int tiles, int step) {
    const int ahead = step / steps, of = step - ahead * steps;
    if (i + ahead >= tiles) return;
    if (of == 0) find_input(T(p, tile_of(i + ahead)));
    if constexpr (!kApart) copy_weights_on(i, tiles, step, thread_index() == 0);
    copy_input(chunk(of), step);
  }

  // Fetches the input of a tile whose first step takes the buffers of `step` of this one.
  FCM_DEVICE void fetch_input(const T& at, int step) {
    if constexpr (stages_input(S)) {
      if (!at.same_place(place)) In::Staged::find(p, staged_vectors, at);
      In::Staged::copy(p, shared + kStagedAt, staged_vectors, at);
    } else if constexpr (kFirst) {
      if (!at.same_clip(place)) find_first_input(at);
      load_first_input(at);
    } else if constexpr (S.mean) {
      average(at);
    } else {
      find_input(at);
      copy_input(chunk0, step);
    }
  }

  // What lies outside the middle map is zero, and `first` never writes it.
  FCM_DEVICE void clear_halo() {
    for (int i = anew(thread_index()) * 16; i < halo_buffers(S) * halo_bytes(S); i += kThreads * 16)
      *(Vec*)(shared + kHaloAt + i) = Vec{};
  }

  // The chunks of the i-th of this block's tiles; `next`: the one after it, if there is any.
  FCM_DEVICE void walk(const T& next, int i, int tiles) {
    const bool more = kResident && i + 1 < tiles;
    if constexpr (kProject) {
      FCM_UNROLL
      for (int py = 0; py < P; ++py) FCM_UNROLL
      for (int ng = 0; ng < kWarpGroupsN; ++ng) FCM_UNROLL
      for (int j = 0; j < kBlocks8; ++j) FCM_UNROLL
      for (int i = 0; i < 4; ++i) sums[py][ng][j][i] = 0;
    }
    if constexpr (kMomentsTaken) {
      FCM_UNROLL
      for (int py = 0; py < P; ++py) moments[py] = Moments<C>{};
    }
    if constexpr (kScalesStream) {
      FCM_UNROLL
      for (int py = 0; py < P; ++py) {
        FCM_UNROLL
        for (int side = 0; side < 2; ++side)  // what is copied may be of another tile already
          factors_of[py][side] = kGoBy ? place.output_pixel(p, L::warp_m(), py, side).n : sources[py][side].n;
      }
    }
    if constexpr (kWgmma && kAhead > 0) {
      copy_async_wait<0>();
      round_first_input();
      wgmma_reads();
      block_sync();
      multiply(-1);
    } else if constexpr (kAhead > 0) {
      settle_first_input();
      first_to_halo(0);
    }
    for (int step = 0; step < steps + kLag; ++step) {
      copy_async_wait<kEarly - 1>();
      if (kStay ? !kAhead && phase + step == 0 : !kAhead || step > 0) wait_for_weights(kGoBy ? phase + step : step);
      if constexpr (kApart) {
        multiply_apart(step, i, tiles);
      } else {
        if constexpr (kMultipliesFirst) wgmma_wait<0>(sums);
        if constexpr (kWgmma) wgmma_reads();
        block_sync();
        if constexpr (kMultipliesFirst) multiply(step);
      }
      if constexpr (!kResident) copy_weights(step + kEarly);
      if constexpr (kGoBy) {
        copy_on(i, tiles, step + kEarly);
      } else if (step + kEarly < steps) {
        if constexpr (!kFirst) copy_input(chunk(step + kEarly), step + kEarly);
      } else if (kFetchesAhead && (!kLoadsAhead || kOneStep) && step + 1 == steps && (kLoadsAhead || more)) {
        fetch_input(next, steps);
      }
      copy_async_commit();
      if constexpr (kWgmma && !kMultipliesFirst)
        multiply(step);
      else if (kAhead > 0 && step + 1 < steps)
        first_to_halo(step + 1);
      if constexpr (kPasses)
        first_to_halo(step);
      else if constexpr (!kStreams && !kFlatFirst)
        if (step < steps) produce(step);
      if constexpr (kWgmma && kMomentsTaken && !kFromRegisters)
        if (step >= kLag) add_exchanged_moments(step - kLag);
      if constexpr (kWgmma && kProject && !kMultipliesFirst)
        wgmma_wait<0>(sums);
      else if constexpr (kExchanges && !kWgmma)
        if (step >= kLag) project_exchanged(step - kLag);
    }
    if constexpr (kMultipliesFirst) wgmma_wait<0>(sums);
    give_up(i, tiles, steps - 1);
    if constexpr (kLoadsAhead && !kOneStep) fetch_input(next, steps);
    if constexpr (S.tile.split > 1)
      reduce_and_store(more);
    else if constexpr (kProject)
      store_all();
  }

  FCM_DEVICE void run() {
    const int tiles = tiles_of();
    // Weights do not depend on the kernels before this one; inputs do.
    let_next_kernel_start();
    if constexpr (S.tile.split > 1) {
      if (thread_index() == 0) bulk_init(received());
      if constexpr (kResident) cluster_give_up();  // for the first reduction
    }
    if constexpr (kBulkCopies) {
      if (thread_index() == 0)
        for (int i = 0; i < kStages; ++i) bulk_init(arrivals(i));
      if (kApart && kGoBy && thread_index() < kStages) *(u32*)(shared + kGivenUpAt + thread_index() * 4) = 0;
      block_sync();
    }
    if constexpr (kStay) {
      for (int i = 0; i < steps; ++i) copy_first(i, 0), copy_depthwise(i, 0), copy_project(i, 0);
      all_asked_for(0);
    } else {
      if constexpr (kAhead > 0) copy_first(0, 0);
      copy_weights(0);
      if constexpr (kApart)
        for (int i = 1; i < kStages; ++i) copy_weights_on(0, tiles, i, thread_index() == 0);
    }
    if (kAhead > 0 && place.crosses_border()) clear_halo();
    find_first_input(place);
    if constexpr (stages_input(S)) In::Staged::find(p, staged_vectors, place);
    wait_for_earlier_kernels();
    fetch_input(place, 0);
    copy_async_commit();
    FCM_UNROLL
    for (int i = 1; i < kEarly; ++i) {
      if constexpr (kGoBy) {
        copy_on(0, tiles, i);
      } else {
        copy_weights(i);
        if (i < steps) copy_input(chunk(i), i);
      }
      copy_async_commit();
    }
    if constexpr (kPlaced) {
      copy_async_wait<0>();
      if constexpr (kAhead > 0) wait_for_weights(0);
      block_sync();
    }
    for (int i = 0;; ++i) {
      const bool more = kResident && i + 1 < tiles;
      T next = more ? place.next(p, tile_of(i + 1)) : place;
      if constexpr (stages_input(S)) load_first_input(place);
      walk(next, i, tiles);
      if (!more) break;
      if constexpr (stages_input(S) && !kPasses) next = place.next(p, tile_of(anew(i + 1)));  // in fewer registers
      phase += steps;
      if constexpr (kPlaced) {
        const bool clear = !kPasses && next.crosses_border() && !next.same_clip(place);
        if (stages_input(S) || clear) {
          copy_async_wait<0>();
          block_sync();
        }
        if (clear) {
          clear_halo();
          block_sync();
        }
      }
      if constexpr (S.mean) block_sync();  // this tile's means are still read
      if constexpr (stages_input(S)) {
        if (!next.same_clip(place)) find_first_input(next);
      } else if constexpr (!kFetchesAhead) {
        fetch_input(next, 0);
      }
      place = next;
    }
  }
};

template <class C>
FCM_DEVICE void run_module(const Params& p) {
  if constexpr (is_gate(C::spec)) {
    Gate<C>(p).run();
  } else if constexpr (is_strip(C::spec)) {
    Strip<C>(p).run();
  } else {
    Module<C> module(p);
    module.run();
  }
}

}  // namespace fcm

// Defines the kernel fcm_module(Params) for the Spec that the constexpr function MAKE returns. Where split > 1 the
// kernel carries its cluster's size, so that a plain launch does.
#define FCM_MODULE(MAKE)                                                                  \
  struct fcm_config {                                                                     \
    static constexpr fcm::Spec spec = MAKE();                                             \
    static_assert(fcm::illegal(spec) == nullptr, "the library checks a Spec before use"); \
  };                                                                                      \
  FCM_KERNEL(fcm_module, fcm_config::spec, fcm::run_module<fcm_config>)
