// The primitives of primitives.cuh on the CPU, for tests: each CUDA thread is a fiber, switched where threads wait for
// one another. Shared memory starts as NaN, asynchronous copies happen no sooner than they are waited for, products of
// a warpgroup then or as soon as they are committed, and the order of threads between barriers is random, so that what
// only luck makes right shows.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "half.h"
#include "spec.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define FCM_DEVICE inline
#define FCM_UNROLL
#define FCM_ROLL
#define __align__(n) alignas(n)

namespace fcm {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

struct alignas(16) Vec {
  u32 r[4];
};
struct alignas(8) HalfVec {
  u32 r[2];
};

namespace cpu {

struct Gate {  // a barrier that can be used again
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

// Half a group of channels of 64 rows times those of `columns` rows, for this lane's rows: at `a`, or (null) in
// registers of the four lanes that have them.
struct Product {
  float* d;
  const char *a, *b;
  int columns, stride, half;
  Type type;
  const Vec* registers[4];
};

struct Arrivals {  // a barrier for bulk copies, or for what a cluster sends
  std::vector<Copy> asked;
  std::vector<std::pair<Vec*, Vec>> sent;
  int expected = 0;  // bytes of these
  bool all = false;
  int turns = 0;  // done
};

struct Warp {
  Gate gate;
  u32 a[32][4], b[32][2];
};

struct Block {
  int x, y, z;
  char* shared;
  Gate gate;
  std::vector<Warp> warps;
  std::vector<Gate> warpgroups;
  std::map<char*, Arrivals> arrivals;
};

struct Fiber {
  ucontext_t context;
  char* stack;
  bool done;
  int thread;
  Block* block;
  std::vector<std::vector<Copy>> copies;       // by commit; the last is still open
  std::vector<std::vector<Product>> products;  // likewise
  std::map<int, Vec> registers;                // that products read, by set
  void* fake_stack;
};

constexpr std::size_t kStack = 1 << 18;

struct Machine {
  std::mt19937 random;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  Gate cluster;
  std::function<void()> kernel;
  long progress = 0;
  int grid_x = 0;
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_size = 0;
};
inline Machine machine;

inline void leave(Fiber& f, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, machine.scheduler_stack, machine.scheduler_size);
#endif
  (void)last;
  swapcontext(&f.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

inline void pass(Gate& g) {
  const unsigned generation = g.generation;
  ++machine.progress;
  if (++g.arrived == g.expected) {
    g.arrived = 0, ++g.generation;
    return;
  }
  Fiber& self = *machine.current;
  while (g.generation == generation) leave(self, false);
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
  machine.kernel();
  machine.current->done = true;
  ++machine.progress;
  leave(*machine.current, true);
}

// Runs `kernel` on a grid; shared memory is exactly as large as the launch says.
inline void run_grid(const Launch& l, unsigned seed, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  machine.grid_x = (int)l.grid_x;
  std::mt19937& random = machine.random;
  random.seed(seed);
  const int fibers = l.threads * l.grid_z;
  std::unique_ptr<char[]> stacks(new char[kStack * fibers]);
  for (long long x = 0; x < l.grid_x; ++x)
    for (int y = 0; y < l.grid_y; ++y) {
      std::vector<std::unique_ptr<Fiber>> all;
      std::vector<Fiber*> live;
      machine.blocks.clear();
      machine.cluster = Gate{fibers, 0, 0};
      for (int z = 0; z < l.grid_z; ++z) {
        auto block = std::make_unique<Block>();
        block->x = (int)x, block->y = y, block->z = z;
        block->shared = (char*)std::aligned_alloc(128, (l.shared_bytes + 127) / 128 * 128 + 128);
        std::memset(block->shared, 0xff, l.shared_bytes);
        block->gate.expected = l.threads;
        block->warps.resize(l.threads / 32);
        for (Warp& w : block->warps) w.gate.expected = 32;
        block->warpgroups.assign(l.threads / 128, Gate{128});
        for (int t = 0; t < l.threads; ++t) {
          auto f = std::make_unique<Fiber>();
          f->stack = stacks.get() + kStack * all.size();
          f->done = false, f->thread = t, f->block = block.get(), f->copies.resize(1), f->products.resize(1),
          f->fake_stack = nullptr;
          getcontext(&f->context);
          f->context.uc_stack.ss_sp = f->stack, f->context.uc_stack.ss_size = kStack, f->context.uc_link = nullptr;
          makecontext(&f->context, (void (*)())enter, 0);
          live.push_back(f.get());
          all.push_back(std::move(f));
        }
        machine.blocks.push_back(std::move(block));
      }
      int late = 0,
          rounds = 0;  // a warp that does not run for some rounds, so that others get as far ahead as they can
      while (!live.empty()) {
        const long before = machine.progress;
        for (std::size_t i = live.size() - 1; i > 0; --i) std::swap(live[i], live[random() % (i + 1)]);
        if (--rounds < 0) late = live[0]->thread / 32, rounds = (int)(random() % 200);
        for (Fiber* f : live) {
          if (rounds > 0 && f->thread / 32 == late) continue;
          machine.current = f;
#if defined(__SANITIZE_ADDRESS__)
          __sanitizer_start_switch_fiber(&machine.fake_stack, f->stack, kStack);
#endif
          swapcontext(&machine.scheduler, &f->context);
#if defined(__SANITIZE_ADDRESS__)
          __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
        }
        std::vector<Fiber*> still;
        for (Fiber* f : live)
          if (!f->done) still.push_back(f);
        live.swap(still);
        if (machine.progress == before && rounds > 0) {
          rounds = 0;
        } else if (machine.progress == before) {
          std::fprintf(stderr, "threads wait for one another for ever\n");
          std::abort();
        }
      }
      for (auto& b : machine.blocks) std::free(b->shared);
    }
}

inline Fiber& self() { return *machine.current; }
inline Warp& warp() { return self().block->warps[self().thread / 32]; }
inline int lane() { return self().thread % 32; }

inline void publish(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  Warp& w = warp();
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  std::memcpy(w.a[lane()], a, sizeof a);
  std::memcpy(w.b[lane()], b, sizeof b);
  pass(w.gate);
}

}  // namespace cpu

FCM_DEVICE int thread_index() { return cpu::self().thread; }
FCM_DEVICE int block_x() { return cpu::self().block->x; }
FCM_DEVICE int block_y() { return cpu::self().block->y; }
FCM_DEVICE int block_z() { return cpu::self().block->z; }
FCM_DEVICE int grid_x() { return cpu::machine.grid_x; }
FCM_DEVICE void let_next_kernel_start() {}
FCM_DEVICE void wait_for_earlier_kernels() {}
FCM_DEVICE void block_sync() { cpu::pass(cpu::self().block->gate); }
FCM_DEVICE void warp_sync() { cpu::pass(cpu::warp().gate); }
FCM_DEVICE void warpgroup_sync() { cpu::pass(cpu::self().block->warpgroups.at(cpu::self().thread / 128)); }
FCM_DEVICE bool is_last(char* counter, int all) {
  u32& count = *(u32*)counter;
  ++cpu::machine.progress;
  count = count + 1 == (u32)all ? 0 : count + 1;
  return count == 0;
}
FCM_DEVICE int warp_uniform(int x) { return x; }
FCM_DEVICE char* shared_memory() { return cpu::self().block->shared; }

template <int WORDS>
FCM_DEVICE void load_constants(u32 (&r)[WORDS], const void* from) {
  std::memcpy(r, from, sizeof r);
}

template <int WORDS>
FCM_DEVICE void load_if(u32 (&r)[WORDS], const void* from, bool valid) {
  if (valid && (std::uintptr_t)from % sizeof r) std::abort();  // misaligned
  for (u32& word : r) word = 0;
  if (valid) std::memcpy(r, from, sizeof r);
}

template <int WORDS>
FCM_DEVICE void store_away(void* to, const u32 (&r)[WORDS]) {
  if ((std::uintptr_t)to % sizeof r) std::abort();  // misaligned
  std::memcpy(to, r, sizeof r);
}

// `x`, in a register that is its own: ptxas would copy an operand of several products in front of each of them, since
// the registers of an operand must be neighbours. `zero` must be, but not be known to be.
FCM_DEVICE u32 pinned(u32 x, u32 zero) { return x ^ zero; }
FCM_DEVICE int anew(int x) { return x; }

FCM_DEVICE float bits_float(u32 x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
FCM_DEVICE u32 float_bits(float x) {
  u32 u;
  std::memcpy(&u, &x, 4);
  return u;
}

namespace cpu {
inline void perform(const Copy& c) {
  if (((std::uintptr_t)c.to | (c.valid ? (std::uintptr_t)c.from : 0)) % min(c.bytes, 16)) std::abort();  // misaligned
  if (c.valid)
    std::memcpy(c.to, c.from, c.bytes);
  else
    std::memset(c.to, 0, c.bytes);
}
}  // namespace cpu

FCM_DEVICE float shuffle_xor(float x, int mask) {
  cpu::publish(float_bits(x), 0, 0, 0, 0, 0);
  const float other = bits_float(cpu::warp().a[cpu::lane() ^ mask][0]);
  cpu::pass(cpu::warp().gate);
  return other;
}

constexpr int kLinesAtOnce = 256;
template <bool READS_ON = false>
FCM_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  cpu::self().copies.back().push_back({shared, global, 16, valid});
}
FCM_DEVICE void copy_async_commit() { cpu::self().copies.emplace_back(); }
template <int PENDING>
FCM_DEVICE void copy_async_wait() {
  auto& copies = cpu::self().copies;
  while (copies.size() > PENDING + 1) {
    for (const cpu::Copy& c : copies.front()) cpu::perform(c);
    copies.erase(copies.begin());
  }
}

// FCM_PLAIN_COPIES: as on a GPU without bulk copies.
#ifdef FCM_PLAIN_COPIES
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif
FCM_DEVICE void bulk_init(char* barrier) { cpu::self().block->arrivals[barrier] = {}; }
FCM_DEVICE void bulk_copy(char* shared, const void* global, int bytes, char* barrier) {
  if (bytes <= 0 || bytes % 16) std::abort();
  cpu::self().block->arrivals.at(barrier).asked.push_back({shared, global, bytes, true});
}
FCM_DEVICE void bulk_asked_for(char* barrier) { cpu::self().block->arrivals.at(barrier).all = true; }
// The first to wait performs the copies.
FCM_DEVICE void bulk_wait(char* barrier, int parity) {
  cpu::Arrivals& a = cpu::self().block->arrivals.at(barrier);
  while (a.turns % 2 == parity) {
    if (!a.all) {
      cpu::leave(cpu::self(), false);
      continue;
    }
    for (const cpu::Copy& c : a.asked) cpu::perform(c);
    a.asked.clear(), a.all = false, ++a.turns, ++cpu::machine.progress;
  }
}

FCM_DEVICE void cluster_arrive() {}
FCM_DEVICE void cluster_give_up() {}
FCM_DEVICE void cluster_wait() { cpu::pass(cpu::machine.cluster); }
FCM_DEVICE void cluster_sync() { cluster_arrive(), cluster_wait(); }
FCM_DEVICE char* cluster_address(const void* shared, int rank) {
  return cpu::machine.blocks[rank]->shared + ((const char*)shared - shared_memory());
}
FCM_DEVICE Vec cluster_load(const void* shared, int rank) { return *(const Vec*)cluster_address(shared, rank); }
FCM_DEVICE void cluster_send(void* shared, char* barrier, int rank, const Vec& v) {
  auto& sent = cpu::machine.blocks[rank]->arrivals.at(cluster_address(barrier, rank)).sent;
  sent.emplace_back((Vec*)cluster_address(shared, rank), v);
  ++cpu::machine.progress;
}
FCM_DEVICE void cluster_expect(char* barrier, int bytes) {
  cpu::Arrivals& a = cpu::self().block->arrivals.at(barrier);
  a.expected = bytes, a.all = true;
}
// It arrives no sooner than it is waited for.
FCM_DEVICE void cluster_wait_for(char* barrier, int parity) {
  cpu::Arrivals& a = cpu::self().block->arrivals.at(barrier);
  while (a.turns % 2 == parity) {
    if (!a.all || (int)a.sent.size() * 16 < a.expected) {
      cpu::leave(cpu::self(), false);
      continue;
    }
    if ((int)a.sent.size() * 16 > a.expected) std::abort();  // of the next turn
    for (const auto& [to, v] : a.sent) *to = v;
    a.sent.clear(), a.all = false, ++a.turns, ++cpu::machine.progress;
  }
}

FCM_DEVICE u32 half2_pack(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
FCM_DEVICE float half_float(unsigned short x) { return half_to_float(x); }
FCM_DEVICE float half2_low(u32 x) { return half_to_float((std::uint16_t)(x & 0xffff)); }
FCM_DEVICE float half2_high(u32 x) { return half_to_float((std::uint16_t)(x >> 16)); }
FCM_DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  return half2_pack(half2_low(a) * half2_low(b) + half2_low(c), half2_high(a) * half2_high(b) + half2_high(c));
}
FCM_DEVICE u32 half2_multiply(u32 a, u32 b) {
  return half2_pack(half2_low(a) * half2_low(b), half2_high(a) * half2_high(b));
}
FCM_DEVICE u32 half2_pack_relu(float low, float high) { return half2_pack(std::fmax(low, 0.f), std::fmax(high, 0.f)); }
FCM_DEVICE u32 half2_fma_relu(u32 a, u32 b, u32 c) {
  const u32 d = half2_fma(a, b, c);
  return half2_pack_relu(half2_low(d), half2_high(d));
}
FCM_DEVICE float maximum(float a, float b) { return std::fmax(a, b); }
FCM_DEVICE float minimum(float a, float b) { return std::fmin(a, b); }
FCM_DEVICE float clip_to(float top, float x) { return minimum(maximum(x, 0.f), top); }
FCM_DEVICE u32 half2_max(u32 a, u32 b) {
  return half2_pack(maximum(half2_low(a), half2_low(b)), maximum(half2_high(a), half2_high(b)));
}
FCM_DEVICE u32 half2_min(u32 a, u32 b) {
  return half2_pack(minimum(half2_low(a), half2_low(b)), minimum(half2_high(a), half2_high(b)));
}

FCM_DEVICE void mma_half(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  cpu::publish(a0, a1, a2, a3, b0, b1);
  const cpu::Warp& w = cpu::warp();
  const auto half = [](u32 pair, int i) { return i % 2 ? half2_high(pair) : half2_low(pair); };
  for (int i = 0; i < 4; ++i) {
    const int row = cpu::lane() / 4, column = cpu::lane() % 4 * 2 + i % 2;
    d[i] = c[i];
    for (int k = 0; k < 16; ++k) {
      const float x = half(w.a[row * 4 + k % 8 / 2][k / 8 * 2 + i / 2], k);
      d[i] += x * half(w.b[column * 4 + k % 8 / 2][k / 8], k);
    }
  }
  cpu::pass(cpu::warp().gate);
}
constexpr u32 kReadOfTf32 = ~0x1fffu;  // the hardware reads no more than TF32's bits
FCM_DEVICE void mma_tf32(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  cpu::publish(a0, a1, a2, a3, b0, b1);
  const cpu::Warp& w = cpu::warp();
  for (int i = 0; i < 4; ++i) {
    const int row = cpu::lane() / 4, column = cpu::lane() % 4 * 2 + i % 2;
    d[i] = c[i];
    for (int k = 0; k < 8; ++k) {
      const float x = bits_float(w.a[row * 4 + k % 4][k / 4 * 2 + i / 2] & kReadOfTf32);
      d[i] += x * bits_float(w.b[column * 4 + k % 4][k / 4] & kReadOfTf32);
    }
  }
  cpu::pass(cpu::warp().gate);
}

FCM_DEVICE void wgmma_reads() {}
template <class Sums>
FCM_DEVICE void wgmma_fence(Sums&) {}
inline void multiply(const cpu::Product& q) {
  const auto element = [&](const char* from) {
    u32 bits = 0;
    std::memcpy(&bits, from, element_bytes(q.type));
    return q.type == Type::float16 ? half_to_float((std::uint16_t)bits) : bits_float(bits & kReadOfTf32);
  };
  const auto at = [&](const char* from, int row, int k, int stride) {
    const int byte = q.half * 32 + k * element_bytes(q.type);
    return element(from + row / 8 * stride + swizzled(row % 8, byte / 16) + byte % 16);
  };
  const auto in_registers = [&](int side, int k) {
    const int word = k * element_bytes(q.type) / 4;
    return element((const char*)&q.registers[word % 4]->r[word / 4 * 2 + side] + k * element_bytes(q.type) % 4);
  };
  const int row0 = cpu::self().thread / 32 % 4 * 16 + cpu::lane() / 4;
  for (int i = 0; i < q.columns / 2; ++i)
    for (int k = 0; k < group(q.type) / 2; ++k) {
      const int side = i % 4 / 2;
      const float a = q.a ? at(q.a, row0 + side * 8, k, 512) : in_registers(side, k);
      q.d[i] += a * at(q.b, i / 4 * 8 + cpu::lane() % 4 * 2 + i % 2, k, q.stride);
    }
}
// All but the `pending` last of what has been committed; a warp multiplies as one.
inline void multiply_all_but(std::size_t pending) {
  auto& products = cpu::self().products;
  cpu::pass(cpu::warp().gate);  // nobody has gone on to write what others still read
  while (products.size() > pending + 1) {
    for (const cpu::Product& q : products.front()) multiply(q);
    products.erase(products.begin());
  }
  cpu::pass(cpu::warp().gate);
}
// As on the GPU, products read their operands, and change their sums, at any time from here until they are waited for:
// at once, or as late as may be.
FCM_DEVICE void wgmma_commit() {
  auto& products = cpu::self().products;
  products.emplace_back();
  multiply_all_but(cpu::machine.random() % 2 ? 0 : products.size());
}
template <int PENDING>
FCM_DEVICE void wgmma_wait_for_operands() {
  multiply_all_but(PENDING);
}
template <int PENDING, class Sums>
FCM_DEVICE void wgmma_wait(Sums&) {
  wgmma_wait_for_operands<PENDING>();
}
template <Type TYPE, int N>
FCM_DEVICE void wgmma(float* d, const char* a, const char* b, int stride, int half) {
  if ((a - shared_memory()) % 512 || (b - shared_memory()) % 512) std::abort();  // misaligned
  cpu::self().products.back().push_back({d, a, b, N, stride, half, TYPE, {}});
}
template <Type TYPE, int N>
FCM_DEVICE void wgmma(float* d, const Vec& a, const char* b, int stride, int half, int set) {
  if ((b - shared_memory()) % 512) std::abort();  // misaligned
  Vec& own = cpu::self().registers[2 * set + half];
  own = a;
  const u64 address = (u64)(std::uintptr_t)&own;
  cpu::publish((u32)address, (u32)(address >> 32), 0, 0, 0, 0);
  cpu::Product q{d, nullptr, b, N, stride, half, TYPE, {}};
  for (int i = 0; i < 4; ++i) {
    const u32(&lane)[4] = cpu::warp().a[(cpu::lane() & ~3) + i];
    q.registers[i] = (const Vec*)(std::uintptr_t)(lane[0] | (u64)lane[1] << 32);
  }
  cpu::pass(cpu::warp().gate);
  cpu::self().products.back().push_back(q);
}

FCM_DEVICE u32 round_tf32(float x) { return float_bits(round_to_tf32(x)); }

FCM_DEVICE float fast_exp2(float x) { return std::exp2(x); }
FCM_DEVICE float fast_reciprocal(float x) { return 1 / x; }
FCM_DEVICE float reciprocal_root(float x) { return 1 / std::sqrt(x); }
FCM_DEVICE float tanh(float x) { return std::tanh(x); }
FCM_DEVICE float erf(float x) { return std::erf(x); }

}  // namespace fcm
