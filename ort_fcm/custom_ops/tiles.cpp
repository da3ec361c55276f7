// The tile of a node: its own if it fits the device, at least without `wgmma`, else the first that does of a short
// ladder.
#include <algorithm>
#include <charconv>
#include <sstream>

#include "error.h"
#include "specialise.h"

namespace fcm {
namespace {

struct TileField {
  const char* name;
  int Tile::* field;
  int low, high;
};

// The bounds keep the arithmetic of spec.h within 32 bits; what is sensible, illegal() decides.
constexpr TileField kFields[] = {
    {"tile_h", &Tile::tile_h, 1, 1024}, {"tile_w", &Tile::tile_w, 1, 65536},     {"images", &Tile::images, 1, 64},
    {"patch_h", &Tile::patch_h, 1, 64}, {"chunk", &Tile::chunk, 1, 1 << 20},     {"warps_m", &Tile::warps_m, 1, 64},
    {"warps_n", &Tile::warps_n, 1, 64}, {"block_n", &Tile::block_n, 0, 1 << 20}, {"split", &Tile::split, 1, 64},
    {"blocks", &Tile::blocks, 1, 64},   {"resident", &Tile::resident, 0, 2},     {"wgmma", &Tile::wgmma, 0, 1},
};

void set_field(Tile& tile, const std::string& word) {
  const size_t equals = word.find('=');
  const std::string key = word.substr(0, equals);
  const auto* field =
      std::find_if(std::begin(kFields), std::end(kFields), [&](const TileField& f) { return key == f.name; });
  if (field == std::end(kFields)) fail("attribute tile has no key '", key, "'");
  int value = 0;
  const char* end = word.data() + word.size();
  const char* begin = equals == std::string::npos ? end : word.data() + equals + 1;
  const auto [stop, error] = std::from_chars(begin, end, value);
  if (error != std::errc() || stop != end || value < field->low || value > field->high)
    fail("attribute tile needs ", key, " to be an integer from ", field->low, " to ", field->high, ", not '",
         std::string(begin, end), "'");
  tile.*field->field = value;
}

// Whether sizes are beyond any GPU's shared memory, and perhaps beyond the 32 bits in which spec.h computes them.
bool oversized(const Spec& spec) {
  constexpr int64_t kBound = 1 << 26;
  const Tile& t = spec.tile;
  const int64_t groups = chunk_groups(spec);
  if (is_gate(spec)) {
    const int64_t depth = int64_t(spec.c_in) + spec.c_mid + 16, rows = int64_t(spec.c_mid) + spec.c_out + 64;
    return depth * t.images > kBound / 8 || (t.resident && depth * rows > kBound);
  }
  if (spec.mean && (int64_t(spec.c_in) + t.chunk) * (t.images + 8) * 4 > kBound) return true;
  int64_t pixels = 0;
  if (spec.depthwise) {
    const int64_t height = halo_h(spec), pitch = int64_t(halo_w(spec)) + 1;
    if (height * pitch > kBound || int64_t(t.tile_h) * t.tile_w > kBound) return true;
    pixels = t.images * height * pitch;
    if (pixels > kBound || groups * pixels * 64 > kBound || groups * depthwise_group_bytes(spec) > kBound) return true;
  }
  if (spec.first != Dense::none && (groups * first_group_bytes(spec) > kBound ||
                                    (pixels / 16 + warps(spec)) * (first_steps(spec) + 1) * kFragment > kBound))
    return true;
  return has_project(spec) && groups * block_n(spec) / 8 * kFragment > kBound;
}

// Why `spec` cannot run within `limits`; empty if it can.
std::string misfit(const Spec& spec, const Limits& limits) {
  const Tile& t = spec.tile;
  if (oversized(spec)) return "it is far too large for shared memory";
  if (const char* reason = illegal(spec)) return reason;
  if (t.split > 1 && !limits.clusters) return "split needs thread block clusters (sm_90)";
  if (t.wgmma && !limits.warpgroups) return "wgmma needs compute capability 9.0";
  if (shared_bytes(spec) > limits.shared_bytes)
    return text("it takes ", shared_bytes(spec), " bytes of shared memory of ", limits.shared_bytes);
  return "";
}

// Tiles in order of preference. Large ones reuse more; the last needs the least shared memory there is.
std::vector<Tile> ladder(const Spec& spec, const Limits& limits) {
  if (is_gate(spec)) {
    Tile tile;
    tile.chunk = group(spec.type), tile.warps_m = 8, tile.split = limits.clusters ? 8 : 1;
    return {tile};
  }
  const int step = group(spec.type);
  if (is_strip(spec)) {
    Tile tile;
    tile.tile_h = tile.patch_h = 2, tile.tile_w = 4;
    tile.chunk = step, tile.block_n = 2 * step;
    return {tile};
  }
  struct Size {
    int h, w;
  };
  std::vector<Tile> tiles;
  for (const Size size : {Size{8, 8}, {8, 4}, {4, 4}, {2, 4}, {2, 2}, {1, 2}})
    // Output channels are cut when they must be, or when it costs no work twice: in a chain that ends in a depthwise.
    for (const int groups : has_project(spec) ? std::vector<int>{0, 8, 4, 2, 1} : std::vector<int>{2, 1}) {
      Tile tile;
      tile.tile_h = size.h, tile.tile_w = size.w;
      tile.warps_m = ceil_div(size.h * size.w / 2, 8);
      if (spec.mean) tile.images = max(1, size.h * size.w / 8);
      tile.chunk = step;
      tile.block_n = groups * step;
      tiles.push_back(tile);
    }
  return tiles;
}

}  // namespace

std::string tile_text(const Tile& tile) {
  std::string out;
  for (const TileField& field : kFields) out += text(out.empty() ? "" : " ", field.name, "=", tile.*field.field);
  return out;
}

Fitted fit_tile(Spec spec, const std::string& tile, const Limits& limits) {
  std::istringstream words(tile);
  std::string word, replaced;
  spec.tile.chunk = group(spec.type);
  bool given = false;
  while (words >> word) {
    set_field(spec.tile, word);
    given = true;
  }
  if (given) {
    replaced = misfit(spec, limits);
    if (replaced.empty()) return {spec, ""};
    spec.tile.wgmma = 0;
    if (misfit(spec, limits).empty()) return {spec, replaced};
  }
  std::string reason;
  for (const Tile& candidate : ladder(spec, limits)) {
    spec.tile = candidate;
    reason = misfit(spec, limits);
    if (reason.empty()) return {spec, replaced};
  }
  fail("no tile fits: with the smallest, ", reason);
}

}  // namespace fcm
