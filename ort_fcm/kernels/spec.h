// What one fused module computes and how it is tiled, as plain constants. The kernels are compiled for one Spec; the
// library fills the same struct at run time to validate a node, pack its weights and size its launch. So each fact
// about a module's geometry is computed in one place, here. C++17, no headers: both NVRTC and a host compiler read it.
//
// A module is [first] -> [depthwise] -> [project], each part optional:
//   first      pointwise (1x1) or a small dense convolution, c_in -> c_mid   (only in front of another part)
//   depthwise  c_mid -> c_mid
//   project    pointwise or dense convolution, c_mid -> c_out                (dense only when it stands alone)
// A single pointwise or dense convolution is a `project`; then c_mid = c_in.
//
// The three parts of a squeeze-and-excite are options of modules: one that ends in a depthwise may write sums of its
// output over the map besides (`pool`), a gate is two pointwises on the mean of X over its map (`mean`), and a module
// that starts with a pointwise may multiply X by a factor for each image and channel (`scaled`). Such a module may take
// a LayerNormalization of X over its channels instead (`norm_epsilon`), whose scale and shift are in the weights. A
// lone pointwise on the mean of X, `mean` too, is how a classification network ends.
#pragma once

namespace fcm {

enum class Type : int { float16 = 0, tf32 = 1, float32 = 2 };  // storage is half, float, float

enum class Dense : int { none = 0, pointwise = 1, convolution = 2 };  // convolution: gathered as an implicit GEMM

enum class Activation : int {
  none = 0,
  relu = 1,
  clip = 2,         // min(max(x, alpha), beta)
  hardswish = 3,    // x * min(max(x / 6 + 1 / 2, 0), 1)
  silu = 4,         // x * sigmoid(x)
  hardsigmoid = 5,  // min(max(alpha * x + beta, 0), 1)
  sigmoid = 6,
  gelu = 7,       // x / 2 * (1 + erf(x / sqrt(2)))
  gelu_tanh = 8,  // the tanh approximation
  leakyrelu = 9,  // x < 0 ? alpha * x : x
  prelu = 10,     // x < 0 ? slope[channel] * x : x
  tanh = 11,
};

struct Act {
  Activation kind = Activation::none;
  float alpha = 0, beta = 0;
};

struct Window {
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  int pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
};

// How the work is cut. The names are the keys of the node's attribute `tile`. Without a depthwise a thread block has
// 16 * patch_h * warps_m consecutive pixels, and tile_h, tile_w and images are not used. Of a lone depthwise
// (`is_strip`) tile_h x tile_w are the pixels of a thread.
struct Tile {
  int tile_h = 8, tile_w = 8;  // output pixels of a thread block; of a strip, of a thread
  int images = 1;              // images of a thread block (more than 1 only when a tile covers the whole output map,
                               // or on a mean)
  int patch_h = 1;             // a thread computes patches of patch_h x 2 output pixels
  int chunk = 32;              // middle channels a step, a multiple of group()
  int warps_m = 4;             // warps along pixels: each has 8 patches
  int warps_n = 1;             // warps along output channels
  int block_n = 0;             // output channels a thread block computes; 0: all
  int split = 1;               // thread blocks of a cluster that share the middle channels (sm_90 and later)
  int blocks = 1;              // thread blocks an SM should hold: bounds the registers of a thread
  int resident = 0;  // 1, 2: a thread block works through many tiles; all weights stay in shared memory, or (2,
                     // of a lone convolution with wgmma) go by once for each tile
  int wgmma = 0;     // 1: four warps multiply 64 pixels at once, from shared memory (sm_90a, not float32)
};

struct Spec {
  Type type = Type::float16;
  Dense first = Dense::none;
  bool depthwise = false;
  Dense project = Dense::none;
  int c_in = 0, c_mid = 0, c_out = 0;
  Window first_window, depthwise_window, project_window;
  Act first_act, depthwise_act, project_act;     // each after its own bias
  bool residual = false;                         // Y = output_act(last_act(...) + R)
  Act output_act;                                // only with a residual
  bool input_nchw = false, output_nchw = false;  // X (or Y and R) is NCHW instead of NHWC
  bool mean = false;                             // pointwises run on the mean of X over height and width
  bool pool = false;                             // also writes sums of Y over parts of the map
  bool scaled = false;                           // X is multiplied by the factor of its image and channel
  float norm_epsilon = 0;                        // above 0: X is normalised over its channels
  bool passes = false;                           // the depthwise hands its input on: first's result is Y
  Tile tile;
};

// Run-time arguments of a kernel. Sizes are in pixels; weights as packed by pack.h.
struct Params {
  const void* x;
  void* y;
  const void* residual;
  const void* first_weight;
  const float* first_bias;
  const void* depthwise_weight;
  const float* depthwise_bias;
  const void* project_weight;
  const float* project_bias;
  const float* first_slope;  // PRelu only, as are the next two
  const float* depthwise_slope;
  const float* project_slope;
  int batch, in_h, in_w, mid_h, mid_w, out_h, out_w, tiles_x, tiles_y;
  const void* scale;  // [batch, c_in]
  void* pool;         // [batch, pool_rows, c_out], of which the mean over rows is the mean of Y over the map
  int pool_rows;
  int tiles;     // of the grid and all that its thread blocks work through
  int backward;  // 1: from the last to the first
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr int min(int a, int b) { return a < b ? a : b; }

// A dense convolution over so few channels is a stem.
constexpr int kStemChannels = 4;

constexpr int element_bytes(Type t) { return t == Type::float16 ? 2 : 4; }

// Channels of a group: 64 bytes, of which each of the four lanes that share a pixel owns 16 contiguous bytes.
constexpr int group(Type t) { return 64 / element_bytes(t); }
constexpr int lane_channels(Type t) { return 16 / element_bytes(t); }

// Pixels of output along one axis, for n of input. 64-bit: the caller validates before narrowing.
constexpr long long window_out(long long n, int kernel, int stride, int dilation, int pad_before, int pad_after) {
  const long long reach = n + pad_before + pad_after - ((long long)dilation * (kernel - 1) + 1);
  return reach < 0 ? 0 : reach / stride + 1;
}

// Two pointwises on a mean have a kernel of their own.
constexpr bool is_gate(const Spec& s) { return s.mean && s.first != Dense::none; }

constexpr int depthwise_taps(const Spec& s) { return s.depthwise_window.kernel_h * s.depthwise_window.kernel_w; }
// So has a lone depthwise, unless its taps are more than registers hold.
constexpr bool is_strip(const Spec& s) {
  return s.depthwise && s.first == Dense::none && s.project == Dense::none && depthwise_taps(s) <= 49;
}

// ---- Threads

constexpr bool weights_stay(const Spec& s) { return s.tile.resident == 1; }
constexpr int warps(const Spec& s) { return s.tile.warps_m * s.tile.warps_n; }
constexpr int threads(const Spec& s) { return 32 * warps(s); }

// ---- Channels
// Tensor-core products take a group of channels in two steps. The channels of `first`'s input and of the output may end
// in half a group, of which each lane owns half of lane_channels(); the middle channels are whole groups.

constexpr int half_group(const Spec& s) { return group(s.type) / 2; }
constexpr int dense_depth(Dense kind, const Window& w, int channels) {
  return kind == Dense::convolution ? w.kernel_h * w.kernel_w * channels : channels;
}
// X under the halo region is staged in shared memory where a dense convolution comes first.
constexpr bool stages_input(const Spec& s) { return s.first == Dense::convolution && s.depthwise; }
// Where windows start an even number of halves apart, rows of a window are read in pairs from an even column on: they
// have `first_lead` taps more in front and perhaps one behind, all with weights of zero.
constexpr bool reads_pairs(const Spec& s) {
  const Window& w = s.first_window;
  return stages_input(s) && s.type == Type::float16 && w.stride_w % 2 == 0 && w.dilation_w == 1;
}
constexpr int first_lead(const Spec& s) { return reads_pairs(s) ? s.first_window.pad_left % 2 : 0; }
constexpr int first_columns(const Spec& s) {
  return reads_pairs(s) ? round_up(s.first_window.kernel_w + first_lead(s), 2) : s.first_window.kernel_w;
}
constexpr int first_depth(const Spec& s) {
  return stages_input(s) ? s.c_in * s.first_window.kernel_h * first_columns(s)
                         : dense_depth(s.first, s.first_window, s.c_in);
}
constexpr int first_steps(const Spec& s) { return ceil_div(first_depth(s), half_group(s)); }
// Which of its taps, [c_in, kernel_h, first_columns], the k-th product of `first` has; beyond them or negative: none.
// Four lanes share a pixel's. Where single taps are read, three of them have the columns of one row of the filter after
// another, which lie on different banks and at the same distances for all; the fourth has the rows that are left.
constexpr int first_tap(const Spec& s, int k) {
  if (!stages_input(s) || s.type == Type::float16 || s.first_window.kernel_w != 3) return k;
  const int steps = first_steps(s), in_group = k % group(s.type), slots = 2 * steps;
  const int share = lane_channels(s.type) / (k / group(s.type) == steps / 2 ? 2 : 1);
  const int lane = in_group / share, slot = k / group(s.type) * lane_channels(s.type) + in_group % share;
  const int rows = s.c_in * s.first_window.kernel_h;
  if (lane < 3) return slot < rows ? slot * 3 + lane : -1;
  const int left = 3 * max(0, rows - slots), i = slot - (slots - left);
  return i < 0 ? -1 : slots * 3 + i;
}
// The depth of `project` (its reduction), and the middle channels of a module without one.
constexpr int middle_channels(const Spec& s) {
  return s.project == Dense::convolution ? dense_depth(s.project, s.project_window, s.c_in) : s.c_mid;
}
constexpr int middle_groups(const Spec& s) { return ceil_div(middle_channels(s), group(s.type)); }
constexpr int chunk_groups(const Spec& s) { return s.tile.chunk / group(s.type); }
constexpr int chunks(const Spec& s) { return ceil_div(middle_groups(s), chunk_groups(s)); }
// Packed weights have whole chunks, so that a copy's size is a constant; groups that pad are not computed.
constexpr int packed_groups(const Spec& s) { return chunks(s) * chunk_groups(s); }

constexpr bool normalises(const Spec& s) { return s.norm_epsilon > 0; }
// Whether sums of x and x^2 are taken while X passes by, and the result is scaled. Else `first` normalises X itself.
constexpr bool takes_moments(const Spec& s) { return normalises(s) && s.first == Dense::none; }

constexpr bool has_project(const Spec& s) { return s.project != Dense::none; }
constexpr int padded_out(const Spec& s) {
  return has_project(s) ? round_up(s.c_out, half_group(s)) : middle_groups(s) * group(s.type);
}
constexpr int block_n(const Spec& s) {
  return s.tile.block_n && s.tile.block_n < padded_out(s) ? s.tile.block_n : padded_out(s);
}
constexpr int blocks_n(const Spec& s) { return ceil_div(padded_out(s), block_n(s)); }
// Groups of output channels of a warp.
constexpr int warp_groups_n(const Spec& s) { return ceil_div(ceil_div(block_n(s), group(s.type)), s.tile.warps_n); }

// ---- Pixels
// With a depthwise, a thread block has images x tile_h x tile_w output pixels, and the middle tensor of its halo region
// in shared memory. Without one, it has 16 * patch_h * warps_m consecutive pixels of the flattened N x OH x OW. On a
// mean, whose map is one pixel, it has `images` of these.

constexpr int patches_x(const Spec& s) { return s.tile.tile_w / 2; }
constexpr int patches(const Spec& s) { return s.tile.tile_h / s.tile.patch_h * patches_x(s); }
constexpr int flat_pixels(const Spec& s) { return s.mean ? s.tile.images : 16 * s.tile.patch_h * s.tile.warps_m; }
constexpr int halo(int pixels, int kernel, int stride, int dilation) {
  return (pixels - 1) * stride + (kernel - 1) * dilation + 1;
}
constexpr int halo_h(const Spec& s) {
  const Window& w = s.depthwise_window;
  return halo(s.tile.tile_h, w.kernel_h, w.stride_h, w.dilation_h);
}
constexpr int halo_w(const Spec& s) {
  const Window& w = s.depthwise_window;
  return halo(s.tile.tile_w, w.kernel_w, w.stride_w, w.dilation_w);
}
constexpr int halo_pitch(const Spec& s) { return round_up(halo_w(s), 2); }
// Pixels of the halo region (or the flat ones) in the rows of a product; a warpgroup's product has 64.
constexpr int first_rows(const Spec& s) {
  if (!s.depthwise) return flat_pixels(s);
  return round_up(s.tile.images * halo_h(s) * halo_w(s), s.tile.wgmma ? 64 : 16);
}
// Tiles of `first`, 16 pixels (or 64), that a warp (or four) computes; where there are fewer tiles than warps, several
// share the groups of a tile.
constexpr int first_tiles(const Spec& s) {
  return s.depthwise ? ceil_div(first_rows(s) / 16, warps(s)) : s.tile.patch_h;
}
constexpr int first_shares(const Spec& s) {
  return s.depthwise && !s.tile.wgmma ? max(1, min(warps(s) / (first_rows(s) / 16), chunk_groups(s))) : 1;
}
constexpr bool first_in_registers(const Spec& s) { return !s.tile.wgmma && first_tiles(s) * first_steps(s) * 4 <= 48; }
// Whether 16 bytes of X's channels can be loaded at once.
constexpr bool vector_input(const Spec& s) { return !s.input_nchw && s.c_in % lane_channels(s.type) == 0; }
// A lone pointwise or dense convolution whose input fragments are copied asynchronously; of a dense one, a group of
// channels under one tap after another.
constexpr bool streams_input(const Spec& s) {
  if (s.first != Dense::none || s.depthwise || s.mean || !vector_input(s)) return false;
  return s.project == Dense::pointwise || (s.project == Dense::convolution && s.c_in % group(s.type) == 0);
}
// Whether what feeds `project` passes between warps through shared memory.
constexpr bool exchanges(const Spec& s) {
  return has_project(s) && !s.mean && (streams_input(s) || s.tile.warps_n > 1 || s.tile.wgmma);
}
// Whether a warpgroup multiplies pixels from registers: on the way there from shared memory, each thread rounds them to
// TF32, or takes X times its factors.
constexpr bool from_registers(const Spec& s) {
  return s.tile.wgmma && streams_input(s) && (s.type == Type::tf32 || s.scaled);
}

// Whether warpgroups need no barrier of all in a step: each multiplies what it has copied itself, and where weights do
// not stay, the last warp to give up a place asks for what comes there next. One that reads pixels from shared memory
// takes two barriers of its own instead, which alone would be the slower.
constexpr bool warpgroups_apart(const Spec& s) {
  return s.tile.wgmma && streams_input(s) && s.tile.resident && s.tile.warps_n == 1 &&
         (from_registers(s) || s.tile.warps_m > 4);
}

// ---- Shared memory, in bytes

constexpr int kFragment = 512;  // 32 lanes x 16 bytes: one operand row block of a group

// Where 16 bytes `column` (of 4) of row `row` (of 8) lie in a row block that warps exchange or a warpgroup multiplies:
// the 64-byte swizzle of the tensor cores, with which neither rows nor columns meet on a bank.
constexpr int swizzled(int row, int column) { return row * 64 + (column ^ row / 2) * 16; }

constexpr int halo_plane_bytes(
    const Spec& s) {  // the halo region of one group, and a slot that swallows what is outside
  return s.tile.images * halo_h(s) * halo_pitch(s) * 64 + 128;
}
constexpr int halo_bytes(const Spec& s) { return s.depthwise && !s.passes ? chunk_groups(s) * halo_plane_bytes(s) : 0; }
constexpr int first_input_bytes(const Spec& s) {
  if (s.first == Dense::none || first_in_registers(s)) return 0;
  if (s.tile.wgmma) return ceil_div(first_steps(s), 2) * first_rows(s) * 64;
  return warps(s) * first_tiles(s) * ceil_div(first_steps(s), 2) * 2 * kFragment;
}
// X under the halo region: [images, c_in, rows, pitch], rows at a multiple of 16 bytes of X. An odd number of vectors
// of 16 bytes a row keeps neighbouring rows on different banks.
constexpr int staged_h(const Spec& s) {
  return halo(halo_h(s), s.first_window.kernel_h, s.first_window.stride_h, s.first_window.dilation_h);
}
constexpr int staged_w(const Spec& s) {
  return halo(halo_w(s), s.first_window.kernel_w, s.first_window.stride_w, s.first_window.dilation_w);
}
constexpr int staged_columns(const Spec& s) {
  return staged_w(s) + first_columns(s) - s.first_window.kernel_w + 16 / element_bytes(s.type) - 1;
}
constexpr int staged_pitch(const Spec& s) {
  const int vector = 16 / element_bytes(s.type);
  return vector * (ceil_div(staged_columns(s), vector) | 1);
}
constexpr int staged_bytes(const Spec& s) {
  return stages_input(s) ? round_up(s.tile.images * s.c_in * staged_h(s) * staged_pitch(s) * element_bytes(s.type), 16)
                         : 0;
}
// Whether resident thread blocks remember where pixels of the halo region come from, four bytes a row of a product.
constexpr bool remembers_places(const Spec& s) {
  return s.tile.resident && !s.tile.wgmma && s.depthwise &&
         (stages_input(s) || (s.first == Dense::pointwise && vector_input(s) && !s.scaled));
}
constexpr int places_bytes(const Spec& s) { return remembers_places(s) ? warps(s) * first_tiles(s) * 64 : 0; }
constexpr int first_group_bytes(const Spec& s) {
  return group(s.type) / 8 * (s.tile.wgmma ? round_up(first_steps(s), 2) : first_steps(s)) * 256;
}
constexpr int depthwise_tap_bytes(const Spec&) { return 64; }
constexpr int depthwise_group_bytes(const Spec& s) { return depthwise_taps(s) * depthwise_tap_bytes(s); }
constexpr int vectors_group_bytes(const Spec& s, const Act& act) {  // bias, and slope of a PRelu
  return group(s.type) * 4 * (act.kind == Activation::prelu ? 2 : 1);
}
constexpr int first_chunk_bytes(const Spec& s) {
  if (s.first == Dense::none) return 0;
  return round_up(chunk_groups(s) * (first_group_bytes(s) + vectors_group_bytes(s, s.first_act)),
                  s.tile.wgmma ? kFragment : 16);
}
constexpr int depthwise_chunk_bytes(const Spec& s) {
  if (!s.depthwise || s.passes) return 0;
  return chunk_groups(s) * (depthwise_group_bytes(s) + vectors_group_bytes(s, s.depthwise_act));
}
constexpr int project_chunk_bytes(const Spec& s) {
  return has_project(s) ? chunk_groups(s) * (block_n(s) / 8) * kFragment : 0;
}
constexpr int exchange_bytes(const Spec& s) {
  return exchanges(s) ? s.tile.warps_m * chunk_groups(s) * s.tile.patch_h * 2 * kFragment : 0;
}
// A block's share of the products of a cluster, of each of its blocks. A unit is a group's products of 16 pixels.
constexpr int reduction_units(const Spec& s) {
  return ceil_div(warps(s) * s.tile.patch_h * warp_groups_n(s), s.tile.split);
}
constexpr int sums_bytes(const Spec& s) { return reduction_units(s) * s.tile.split * (group(s.type) / 8) * kFragment; }
constexpr int kMoments = 128;  // of 16 pixels: the sums of x and of x^2
constexpr int moments_bytes(const Spec& s) { return s.tile.warps_m * s.tile.patch_h * kMoments; }
constexpr int reduction_bytes(const Spec& s) {
  if (s.tile.split == 1) return 0;
  return sums_bytes(s) + (takes_moments(s) ? s.tile.split * moments_bytes(s) : 0);
}
// Chunks that a thread block walks over, at most.
constexpr int block_chunks(const Spec& s) {
  return has_project(s) ? ceil_div(chunks(s), s.tile.split) : ceil_div(block_n(s), s.tile.chunk);
}
// Buffers of what a step copies: two, or three where products of warpgroups alone cannot hide a copy.
constexpr int stages(const Spec& s) { return streams_input(s) && s.tile.wgmma && !weights_stay(s) ? 3 : 2; }
// The means of a lone pointwise's input, of all channels that a thread block multiplies: of each group of them, 64
// bytes an image in row blocks. And what threads that share a sum give to one another.
constexpr int mean_rows(const Spec& s) { return round_up(s.tile.images, 8); }
constexpr int mean_parts_bytes(const Spec& s) { return threads(s) * lane_channels(s.type) * 4; }
constexpr int means_bytes(const Spec& s) { return block_chunks(s) * chunk_groups(s) * mean_rows(s) * 64; }
// Everything that is written while something else is read has as many buffers. One will do for a chain whose thread
// blocks have one chunk, and no tile to follow or a barrier in front of it; lone pointwises and pairs are faster where
// an SM has no room for a second thread block, as they then spread over all SMs.
constexpr bool one_buffer(const Spec& s) {
  const bool chain = s.first != Dense::none && s.depthwise && (has_project(s) || stages_input(s));
  return chain && block_chunks(s) == 1 && (!s.tile.resident || stages_input(s));
}
constexpr int buffers(const Spec& s) { return one_buffer(s) && !s.tile.resident ? 1 : stages(s); }
constexpr int weight_buffers(const Spec& s) { return weights_stay(s) ? block_chunks(s) : buffers(s); }
constexpr int halo_buffers(const Spec& s) { return one_buffer(s) ? 1 : 2; }
// The reduction comes after all of it, in its place, unless there are tiles to follow.
constexpr int working_bytes(const Spec& s) {
  return (s.mean ? means_bytes(s) + mean_parts_bytes(s) : 0) + first_input_bytes(s) + staged_bytes(s) +
         places_bytes(s) + halo_buffers(s) * halo_bytes(s) + buffers(s) * exchange_bytes(s) +
         weight_buffers(s) * (first_chunk_bytes(s) + depthwise_chunk_bytes(s) + project_chunk_bytes(s));
}
constexpr int reduction_at(const Spec& s) { return s.tile.resident ? working_bytes(s) : 0; }
// Barriers of 8 bytes: one a stage, at which asynchronous copies of weights arrive, and the fourth for what a cluster's
// blocks send; and where weights go by, for each stage how many warps have given it up.
constexpr int arrivals_at(const Spec& s) { return max(working_bytes(s), reduction_at(s) + reduction_bytes(s)); }
// ---- Pool: a row of sums for every warp that has pixels of a tile; behind a project, for every 16 pixels of a warp;
// of a strip, for every patch.
// Without a depthwise, 16 pixels may be of several images, and an image has rows for all that touch it.

constexpr int pool_warps(const Spec& s) { return ceil_div(patches(s), 8); }
constexpr int tile_pool_rows(const Spec& s) {
  return is_strip(s) ? 1 : pool_warps(s) * (has_project(s) ? s.tile.patch_h : 1);
}
constexpr int flat_pool_rows(int pixels) { return ceil_div(pixels - 1, 16) + 1; }

// ---- Gate: a thread block has `images` images; the blocks of a cluster share the middle and the output
// channels. Rows of weights are padded to whole lanes. With `resident`, weights lie in shared memory.

constexpr int gate_depth(const Spec& s, int channels) { return round_up(channels, lane_channels(s.type)); }
constexpr int gate_share(const Spec& s, int channels) { return round_up(ceil_div(channels, s.tile.split), 4); }
constexpr int gate_mean_bytes(const Spec& s) { return s.tile.images * gate_depth(s, s.c_in) * 4; }
constexpr int gate_hidden_bytes(const Spec& s) { return s.tile.images * gate_depth(s, s.c_mid) * 4; }
constexpr int gate_weight_bytes(const Spec& s, int outputs, int depth) {
  return gate_share(s, outputs) * gate_depth(s, depth) * element_bytes(s.type);
}
constexpr int gate_bytes(const Spec& s) {
  const int weights = gate_weight_bytes(s, s.c_mid, s.c_in) + gate_weight_bytes(s, s.c_out, s.c_mid);
  return gate_mean_bytes(s) + mean_parts_bytes(s) + gate_hidden_bytes(s) + (s.tile.resident ? weights : 0);
}

// ---- Strip: a thread has tile_h x tile_w pixels for one, two or four words of channels, whose taps stay in its
// registers. A thread block has block_n channels, shared out over 32 * warps_n lanes, of as many patches as it has
// threads for; with `resident` it works through many. tile_h is patch_h, and chunk a group.

constexpr int word_channels(Type t) { return 4 / element_bytes(t); }
constexpr int strip_all_words(const Spec& s) { return ceil_div(min(block_n(s), s.c_in), word_channels(s.type)); }
constexpr int strip_words(const Spec& s) {
  const int needed = ceil_div(strip_all_words(s), 32 * s.tile.warps_n);
  return needed <= 2 ? needed : needed <= 4 ? 4 : needed;
}
constexpr int strip_lanes(const Spec& s) { return ceil_div(strip_all_words(s), strip_words(s)); }
constexpr int strip_patches(const Spec& s) { return threads(s) / strip_lanes(s); }

constexpr int shared_bytes(const Spec& s) {
  return is_gate(s) ? gate_bytes(s) : is_strip(s) ? 0 : arrivals_at(s) + (s.tile.resident == 2 ? 48 : 32);
}

// ---- Launch

struct Launch {
  long long grid_x;                           // tiles, then images
  int grid_y, grid_z, threads, shared_bytes;  // a cluster is all blocks along z
  int mid_h, mid_w, out_h, out_w, tiles_x, tiles_y;
  int pool_rows;
  long long tiles;  // that thread blocks work through
};

// Multiprocessors that clusters of `split` thread blocks reach at once: a cluster lies within one group of them, and
// the groups of a chip are of uneven size (H200, measured: 30 clusters of 4, 14 of 8).
constexpr int cluster_sms(int sms, int split) {
  return split < 4 ? sms / split * split : split == 4 ? sms * 10 / 11 / 4 * 4 : sms * 6 / 7 / 8 * 8;
}

// The launch for X of `batch` images of h x w pixels on a GPU of `sms` multiprocessors, which only resident blocks care
// for: they fill it, as `held` of them fit on one, at least tile.blocks. A side that the windows leave nothing of is 0.
constexpr Launch launch(const Spec& s, long long batch, long long h, long long w, int sms = 0, int held = 0) {
  Launch l{};
  if (s.mean) h = w = 1;
  if (is_gate(s)) {
    l.mid_h = l.mid_w = l.out_h = l.out_w = l.tiles_x = l.tiles_y = 1;
    l.tiles = l.grid_x = (batch + s.tile.images - 1) / s.tile.images;
    l.grid_y = 1, l.grid_z = s.tile.split;
    l.threads = threads(s), l.shared_bytes = shared_bytes(s);
    return l;
  }
  const Window& f = s.first != Dense::none ? s.first_window : s.project_window;
  const bool dense_first = s.first != Dense::none;
  long long mid_h = h, mid_w = w;
  if (dense_first || !s.depthwise) {
    mid_h = window_out(h, f.kernel_h, f.stride_h, f.dilation_h, f.pad_top, f.pad_bottom);
    mid_w = window_out(w, f.kernel_w, f.stride_w, f.dilation_w, f.pad_left, f.pad_right);
  }
  long long out_h = mid_h, out_w = mid_w;
  if (s.depthwise) {
    const Window& d = s.depthwise_window;
    out_h = window_out(mid_h, d.kernel_h, d.stride_h, d.dilation_h, d.pad_top, d.pad_bottom);
    out_w = window_out(mid_w, d.kernel_w, d.stride_w, d.dilation_w, d.pad_left, d.pad_right);
  }
  l.mid_h = (int)mid_h, l.mid_w = (int)mid_w, l.out_h = (int)out_h, l.out_w = (int)out_w;
  if (s.depthwise) {
    l.tiles_x = ceil_div(l.out_w, s.tile.tile_w), l.tiles_y = ceil_div(l.out_h, s.tile.tile_h);
    l.grid_x = (long long)l.tiles_x * l.tiles_y * ((batch + s.tile.images - 1) / s.tile.images);
    if (is_strip(s)) l.grid_x = (l.grid_x + strip_patches(s) - 1) / strip_patches(s);
  } else {
    l.tiles_x = l.tiles_y = 1;
    l.grid_x = (batch * out_h * out_w + flat_pixels(s) - 1) / flat_pixels(s);
  }
  l.tiles = l.grid_x;
  if (s.tile.resident && sms > 0) {
    const int room = s.tile.split > 1 ? s.tile.blocks : max(held, s.tile.blocks);
    const long long blocks = max(1, cluster_sms(sms, s.tile.split) * room / (blocks_n(s) * s.tile.split));
    l.grid_x = l.grid_x < blocks ? l.grid_x : blocks;
  }
  if (s.pool) l.pool_rows = s.depthwise ? l.tiles_x * l.tiles_y * tile_pool_rows(s) : flat_pool_rows(l.out_h * l.out_w);
  l.grid_y = blocks_n(s), l.grid_z = s.tile.split;
  l.threads = threads(s), l.shared_bytes = shared_bytes(s);
  return l;
}

// Why the kernels cannot run this Spec, or nullptr. Shared memory against a device's limit is the caller's to check.
constexpr const char* illegal(const Spec& s) {
  const Tile& t = s.tile;
  if (s.c_in <= 0 || s.c_mid <= 0 || s.c_out <= 0) return "channel counts must be positive";
  if (s.first == Dense::none && !s.depthwise && !has_project(s)) return "a module needs a stage";
  if (s.first != Dense::none && !s.depthwise && !has_project(s)) return "a lone convolution is a project";
  const Window& last = s.project_window;
  if (has_project(s) && (s.first != Dense::none || s.depthwise) && (last.stride_h != 1 || last.stride_w != 1))
    return "a pointwise behind another stage has stride 1";
  if (s.project == Dense::convolution && (s.first != Dense::none || s.depthwise))
    return "a dense convolution must come first";
  if (s.first == Dense::none && s.c_mid != s.c_in) return "without a first stage the middle channels are the input's";
  if (!has_project(s) && s.c_mid != s.c_out) return "without a project the middle channels are the output's";
  const bool pointwise_first =
      s.first == Dense::pointwise || (s.first == Dense::none && !s.depthwise && s.project == Dense::pointwise);
  if (s.scaled && (!pointwise_first || s.mean)) return "a factor of X needs a pointwise at the start";
  if (normalises(s) && (!pointwise_first || s.mean || s.scaled))
    return "a normalised X needs a pointwise at the start, and no factors";
  if (s.pool && (s.mean || (!has_project(s) && s.residual)))
    return "sums over the map are of a map, and of a depthwise at the end without a residual";
  if (t.chunk <= 0 || t.chunk % group(s.type)) return "chunk must be a multiple of a group of channels";
  if (s.mean && (s.first == Dense::convolution || s.depthwise || s.project != Dense::pointwise || s.residual))
    return "behind a mean there are one or two pointwise convolutions";
  if (is_gate(s)) {
    if (t.warps_m < 1 || t.warps_n != 1 || warps(s) > 16) return "a gate has 1 to 16 warps";
    if (t.images < 1 || t.images > 64) return "a gate has 1 to 64 images";
    if (t.split != 1 && t.split != 2 && t.split != 4 && t.split != 8) return "split must be 1, 2, 4 or 8";
    if (t.resident != 0 && t.resident != 1) return "resident must be 0 or 1";
    if (t.blocks < 1 || t.blocks * threads(s) > 2048) return "blocks times threads must fit an SM";
    return nullptr;
  }
  if (t.patch_h < 1 || t.patch_h > 8) return "patch_h must be from 1 to 8";
  if (t.warps_m < 1 || t.warps_n < 1 || warps(s) > 16) return "a thread block has 1 to 16 warps";
  if (t.images < 1 || t.tile_h < 1 || t.tile_w < 1 || t.tile_h > 1024 || t.tile_w > 65536 || t.images > 64)
    return "a tile has at least one image and one pixel";
  if (is_strip(s)) {
    if (t.tile_h != t.patch_h || t.tile_w > 32 || t.images != 1 || t.split != 1 || t.wgmma != 0)
      return "a thread of a lone depthwise has patch_h = tile_h by at most 32 pixels of one image";
    if (t.chunk != group(s.type) || t.block_n < 0 || t.block_n % group(s.type))
      return "a lone depthwise has whole groups of channels in block_n, and one in chunk";
    if (strip_words(s) > 4) return "a thread of a lone depthwise has at most 16 bytes of channels";
    if (t.resident != 0 && t.resident != 1) return "resident must be 0 or 1";
    if (t.blocks < 1 || t.blocks * threads(s) > 2048) return "blocks times threads must fit an SM";
    return nullptr;
  }
  const Window& w = s.depthwise_window;
  if (s.passes && (!stages_input(s) || has_project(s) || s.residual || s.pool || depthwise_taps(s) != 1 ||
                   w.stride_h != 1 || w.stride_w != 1 || w.pad_top || w.pad_left || w.pad_bottom || w.pad_right))
    return "only a depthwise of one tap, at the end behind a convolution, hands on what it is given";
  if (s.depthwise && (t.tile_h % t.patch_h || t.tile_w % 2)) return "a tile must be made of whole patches";
  if (s.depthwise && 8 * t.warps_m < t.images * patches(s)) return "the warps do not cover the tile";
  if (s.mean && t.images > 16 * t.patch_h * t.warps_m) return "the warps do not cover the images";
  if (!s.depthwise && !s.mean && t.images != 1) return "images needs a depthwise or a mean";
  if (s.pool && t.images > 1 && patches(s) % 8) return "sums of several images need warps of one image each";
  if (t.block_n < 0 || t.block_n % group(s.type)) return "block_n must be a multiple of a group of channels";
  if (!has_project(s) && block_n(s) % t.chunk && blocks_n(s) > 1) return "block_n must be a multiple of chunk";
  if (!has_project(s) && t.warps_n != 1) return "warps_n needs a project";
  if (t.warps_n > 1 && !s.mean && chunk_groups(s) % t.warps_n) return "chunk must have a group for each of warps_n";
  if (t.split != 1 && t.split != 2 && t.split != 4 && t.split != 8) return "split must be 1, 2, 4 or 8";
  if (t.split > 1 && !has_project(s)) return "split needs a project";
  if (t.split > chunks(s)) return "split must not exceed the chunks";
  if (t.resident < 0 || t.resident > 2) return "resident must be 0, 1 or 2";
  if (t.wgmma != 0 && t.wgmma != 1) return "wgmma must be 0 or 1";
  if (t.resident == 2 && (!t.wgmma || !streams_input(s) || t.split > 1))
    return "resident = 2 needs wgmma, a lone convolution of vectors of channels, and no split";
  if (t.wgmma && s.type == Type::float32) return "wgmma needs float16 or TF32";
  const bool loads = s.first != Dense::none && !s.depthwise;  // X, and does not copy it
  if (t.wgmma && !loads && (s.mean || (s.scaled && !streams_input(s)) || (normalises(s) && s.first != Dense::none)))
    return "wgmma reads X as it is";
  if (t.wgmma && (s.first == Dense::none || !s.depthwise) && !has_project(s))
    return "wgmma needs a pointwise in front of a depthwise, or a project";
  if (t.wgmma && s.first == Dense::convolution) return "wgmma needs pointwise";
  if (t.wgmma && has_project(s) && (block_n(s) % t.warps_n || block_n(s) / t.warps_n % group(s.type)) && t.warps_n > 1)
    return "wgmma needs whole groups of output channels for each of warps_n";
  if (t.wgmma && t.warps_m % 4) return "wgmma needs warps_m to be a multiple of 4";
  if (t.wgmma && s.first != Dense::none && t.chunk > 128) return "wgmma needs a chunk of at most 128 channels";
  if (t.blocks < 1 || t.blocks * threads(s) > 2048) return "blocks times threads must fit an SM";
  if (has_project(s) && t.patch_h * warp_groups_n(s) * group(s.type) / 2 > 168)
    return "accumulators do not fit the registers";
  return nullptr;
}

}  // namespace fcm
