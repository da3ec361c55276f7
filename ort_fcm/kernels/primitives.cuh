// Everything the kernels ask of the machine: indices, barriers, asynchronous copies, tensor-core products, packed half
// arithmetic, clusters. All PTX stands here, and no CUDA header is needed (NVRTC comes with none). primitives_cpu.h
// implements the same names on the CPU, where the kernels' own source runs under sanitizers.
#pragma once

#include "spec.h"

#ifdef FCM_CPU
#include "primitives_cpu.h"
#else

#define FCM_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FCM_WARPGROUPS
#endif
#define FCM_UNROLL _Pragma("unroll")
#define FCM_ROLL _Pragma("unroll 1")

namespace fcm {

using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec {  // 16 bytes: lane_channels() channels of one pixel
  u32 r[4];
};
struct alignas(8) HalfVec {
  u32 r[2];
};

FCM_DEVICE int thread_index() { return threadIdx.x; }
FCM_DEVICE int block_x() { return blockIdx.x; }
FCM_DEVICE int block_y() { return blockIdx.y; }
FCM_DEVICE int block_z() { return blockIdx.z; }
FCM_DEVICE int grid_x() { return gridDim.x; }
FCM_DEVICE void block_sync() { __syncthreads(); }
FCM_DEVICE void warp_sync() { __syncwarp(); }
FCM_DEVICE void warpgroup_sync() { asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory"); }
// Whether this thread is the last of `all` to come here, of as many each time: what the others did before is done.
FCM_DEVICE bool is_last(char* counter, int all) {
  u32 before;
  asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"((u32)__cvta_generic_to_shared(counter)), "r"(all - 1)
               : "memory");
  return before + 1 == (u32)all;
}
// What is the same in all lanes of a warp, so that the compiler knows.
FCM_DEVICE int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Where the launch allows it (sm_90 and later), a kernel starts while the one before it in the stream still runs.
FCM_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until this returns, nothing that earlier kernels write may be read, and nothing that they read written.
FCM_DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

FCM_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char fcm_shared[];
  return fcm_shared;
}

// `x`, in a register that is its own: ptxas would copy an operand of several products in front of each of them, since
// the registers of an operand must be neighbours. `zero` must be, but not be known to be.
FCM_DEVICE u32 pinned(u32 x, u32 zero) { return x ^ zero; }

// `x`, of which the compiler does not know that it is the same as before: what is computed from it within a loop, and
// seldom, is not held in registers around it.
FCM_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

FCM_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
FCM_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }

// Of what no kernel ever writes, as weights are: such loads may pass stores. Volatile, or they would pass the branch
// that says whether there is anything to load.
FCM_DEVICE void load_constants(u32 (&r)[4], const void* from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(from));
}
FCM_DEVICE void load_constants(u32 (&r)[2], const void* from) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(from));
}
FCM_DEVICE void load_constants(u32 (&r)[1], const void* from) {
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r[0]) : "l"(from));
}

// Of what earlier kernels wrote; zeros if not `valid`. Volatile, so that loads stay behind the wait for these kernels,
// and in front of what they are written in front of.
FCM_DEVICE void load_if(u32 (&r)[1], const void* from, bool valid) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.u32 %0, [%1];}"
               : "=&r"(r[0])
               : "l"(from), "r"((u32)valid));
}
FCM_DEVICE void load_if(u32 (&r)[2], const void* from, bool valid) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; @p ld.global.v2.u32 {%0, %1}, [%2];}"
               : "=&r"(r[0]), "=&r"(r[1])
               : "l"(from), "r"((u32)valid));
}
FCM_DEVICE void load_if(u32 (&r)[4], const void* from, bool valid) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(r[0]), "=&r"(r[1]), "=&r"(r[2]), "=&r"(r[3])
      : "l"(from), "r"((u32)valid));
}

// 16 and 8 bytes that no thread block reads again, which need not stay in L1.
FCM_DEVICE void store_away(void* to, const u32 (&r)[4]) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}
FCM_DEVICE void store_away(void* to, const u32 (&r)[2]) {
  asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(r[0]), "r"(r[1]) : "memory");
}

// `x` of the lane whose number differs in the bits of `mask`; all lanes of the warp must be here.
FCM_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// ---- Asynchronous copies to shared memory (plain ones before sm_80)

constexpr int kLinesAtOnce = 256;  // bytes

// 16 bytes; zeros if not `valid`. READS_ON: all of the kLinesAtOnce bytes among which they lie come to L2, as they are
// read soon.
template <bool READS_ON = false>
FCM_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  const u32 address = (u32)__cvta_generic_to_shared(shared);
  if constexpr (READS_ON)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#else
  *(Vec*)shared = valid ? *(const Vec*)global : Vec{};
#endif
}
FCM_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>
FCM_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- Bulk copies (sm_90 and later): one thread asks, and all can wait at a barrier in shared memory. A barrier's
// turns alternate between parity 0 and 1.

#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;

FCM_DEVICE void bulk_init(char* barrier) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"((u32)__cvta_generic_to_shared(barrier))
      : "memory");
}
// `bytes`, a multiple of 16, from and to multiples of 16.
FCM_DEVICE void bulk_copy(char* shared, const void* global, int bytes, char* barrier) {
  const u32 to = (u32)__cvta_generic_to_shared(shared), at = (u32)__cvta_generic_to_shared(barrier);
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%3], %2;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(global), "r"(bytes), "r"(at)
      : "memory");
}
// Ends the asking of a turn.
FCM_DEVICE void bulk_asked_for(char* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
FCM_DEVICE void bulk_wait(char* barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"((u32)__cvta_generic_to_shared(barrier)),
      "r"(parity)
      : "memory");
}
#else
constexpr bool kBulkCopies = false;

FCM_DEVICE void bulk_init(char*) {}
FCM_DEVICE void bulk_copy(char*, const void*, int, char*) {}
FCM_DEVICE void bulk_asked_for(char*) {}
FCM_DEVICE void bulk_wait(char*, int) {}
#endif

// ---- Clusters (sm_90 and later): their blocks lie along z

// A barrier in two parts: nobody returns from waiting before all threads of the cluster have arrived. What a thread
// wrote before it arrived is there for all; of what it gives up, which it has only read, nothing need be, and it saves
// waiting for all that it wrote.
FCM_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
FCM_DEVICE void cluster_give_up() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
FCM_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
FCM_DEVICE void cluster_sync() { cluster_arrive(), cluster_wait(); }
// Where `shared` lies in the shared memory of block `rank` of the cluster.
FCM_DEVICE u32 cluster_address(const void* shared, int rank) {
  u32 remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"((u32)__cvta_generic_to_shared(shared)), "r"(rank));
#endif
  return remote;
}
// 16 bytes from there, and to there.
FCM_DEVICE Vec cluster_load(const void* shared, int rank) {
  Vec v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.r[0]), "=r"(v.r[1]), "=r"(v.r[2]), "=r"(v.r[3])
               : "r"(cluster_address(shared, rank))
               : "memory");
#else
  (void)shared, (void)rank;
#endif
  return v;
}
// The store alone, without a barrier of all: 16 bytes count at one that block `rank` waits at (of bulk_init), which one
// of its threads tells how many to expect in a turn.
FCM_DEVICE void cluster_send(void* shared, char* barrier, int rank, const Vec& v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   cluster_address(shared, rank)),
               "r"(v.r[0]), "r"(v.r[1]), "r"(v.r[2]), "r"(v.r[3]), "r"(cluster_address(barrier, rank))
               : "memory");
#else
  (void)shared, (void)barrier, (void)rank, (void)v;
#endif
}
FCM_DEVICE void cluster_expect(char* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((u32)__cvta_generic_to_shared(barrier)),
               "r"(bytes)
               : "memory");
#else
  (void)barrier, (void)bytes;
#endif
}
FCM_DEVICE void cluster_wait_for(char* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"((u32)__cvta_generic_to_shared(barrier)),
      "r"(parity)
      : "memory");
#else
  (void)barrier, (void)parity;
#endif
}

// ---- Half precision: two packed in 32 bits, the first in the low half

FCM_DEVICE u32 half2_pack(float low, float high) {
  u32 d;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  unsigned short l, h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
  d = (u32)l | ((u32)h << 16);
#endif
  return d;
}
// max(x, 0) of both.
FCM_DEVICE u32 half2_pack_relu(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 d;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return half2_pack(fmaxf(low, 0.f), fmaxf(high, 0.f));
#endif
}
FCM_DEVICE float half_float(unsigned short x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
}
FCM_DEVICE float half2_low(u32 x) { return half_float((unsigned short)(x & 0xffff)); }
FCM_DEVICE float half2_high(u32 x) { return half_float((unsigned short)(x >> 16)); }
FCM_DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
FCM_DEVICE u32 half2_multiply(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// max(a * b + c, 0)
FCM_DEVICE u32 half2_fma_relu(u32 a, u32 b, u32 c) {
#if __CUDA_ARCH__ >= 800
  u32 d;
  asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  const u32 d = half2_fma(a, b, c);
  return half2_pack_relu(half_float((unsigned short)(d & 0xffff)), half_float((unsigned short)(d >> 16)));
#endif
}
FCM_DEVICE u32 half2_max(u32 a, u32 b) {
  u32 d;
#if __CUDA_ARCH__ >= 800
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  d = half2_pack(fmaxf(half2_low(a), half2_low(b)), fmaxf(half2_high(a), half2_high(b)));
#endif
  return d;
}
FCM_DEVICE u32 half2_min(u32 a, u32 b) {
  u32 d;
#if __CUDA_ARCH__ >= 800
  asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  d = half2_pack(fminf(half2_low(a), half2_low(b)), fminf(half2_high(a), half2_high(b)));
#endif
  return d;
}

// ---- Tensor-core products: d[16 x 8] = a * b + c, operands as the hardware lays them over the lanes of a warp

// a is 16 x 16, b 16 x 8, both half.
FCM_DEVICE void mma_half(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, "
      "%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  float e[4];
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(e[0]), "=f"(e[1]), "=f"(e[2]), "=f"(e[3])
      : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a2), "r"(a3), "r"(b1), "f"(e[0]), "f"(e[1]), "f"(e[2]), "f"(e[3]));
#endif
}

// a is 16 x 8, b 8 x 8, both float rounded to TF32; before sm_80, exact float products over shuffles.
FCM_DEVICE void mma_tf32(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  const int lane = threadIdx.x % 32, column = lane % 4 * 8;
  FCM_UNROLL
  for (int i = 0; i < 4; ++i) d[i] = c[i];
#pragma unroll 1  // slow as it is; unrolled it would take minutes to compile
  for (int k = 0; k < 8; ++k) {
    const int row_lane = (lane & ~3) | (k & 3);
    const float x0 = bits_float(__shfl_sync(~0u, k < 4 ? a0 : a2, row_lane));
    const float x1 = bits_float(__shfl_sync(~0u, k < 4 ? a1 : a3, row_lane));
    const float y0 = bits_float(__shfl_sync(~0u, k < 4 ? b0 : b1, column + (k & 3)));
    const float y1 = bits_float(__shfl_sync(~0u, k < 4 ? b0 : b1, column + 4 + (k & 3)));
    d[0] += x0 * y0, d[1] += x0 * y1, d[2] += x1 * y0, d[3] += x1 * y1;
  }
#endif
}

// To the nearest TF32; what lies in the low 13 bits, no product reads. Ties go to even where that is one instruction.
FCM_DEVICE u32 round_tf32(float x) {
#if __CUDA_ARCH__ >= 900
  u32 d;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(d) : "f"(x));
  return d;
#elif __CUDA_ARCH__ >= 800
  u32 d;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(x));
  return d;
#else
  return float_bits(x);
#endif
}

// ---- Products of a warpgroup, four warps whose threads all take part (sm_90a): they start, and are waited for

// Where in shared memory row blocks of eight 64-byte rows lie (`swizzled` in spec.h), one every `stride` bytes.
FCM_DEVICE u64 row_blocks(const char* shared, int stride) {
  constexpr u64 kSwizzle64 = 2;
  return kSwizzle64 << 62 | (u64)(stride >> 4) << 32 | 1 << 16 | (u32)__cvta_generic_to_shared(shared) >> 4;
}
// What this thread wrote to shared memory may be multiplied by others after the next barrier.
FCM_DEVICE void wgmma_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before products that add to `sums`. All of these are in registers of their own from here on: a copy between products
// would wait for them.
template <class Sums>
FCM_DEVICE void wgmma_fence(Sums& sums) {
#ifdef FCM_WARPGROUPS
  float* d = (float*)&sums;
  FCM_UNROLL
  for (int i = 0; i < (int)(sizeof(Sums) / 4); ++i) asm volatile("" : "+f"(d[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
FCM_DEVICE void wgmma_commit() {
#ifdef FCM_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the PENDING last committed are done; `sums` are their results.
template <int PENDING, class Sums>
FCM_DEVICE void wgmma_wait(Sums& sums) {
#ifdef FCM_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  float* d = (float*)&sums;
  FCM_UNROLL
  for (int i = 0; i < (int)(sizeof(Sums) / 4); ++i) asm volatile("" : "+f"(d[i])::"memory");  // not read before
#endif
}
// Until the registers that all but the PENDING last committed read may be written.
template <int PENDING>
FCM_DEVICE void wgmma_wait_for_operands() {
#ifdef FCM_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

#define FCM_R8 "%0,%1,%2,%3"
#define FCM_R16 FCM_R8 ",%4,%5,%6,%7"
#define FCM_R32 FCM_R16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FCM_R48 FCM_R32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define FCM_R64 FCM_R48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define FCM_R96 FCM_R64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FCM_R128 FCM_R96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FCM_R160 FCM_R128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define FCM_R192 FCM_R160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FCM_R256                                                                 \
  FCM_R192                                                                       \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FCM_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FCM_SUMS8(i) FCM_SUMS4(i), FCM_SUMS4(i + 4)
#define FCM_D8 FCM_SUMS4(0)
#define FCM_D16 FCM_SUMS8(0)
#define FCM_D32 FCM_D16, FCM_SUMS8(8)
#define FCM_D48 FCM_D32, FCM_SUMS8(16)
#define FCM_D64 FCM_D48, FCM_SUMS8(24)
#define FCM_D96 FCM_D64, FCM_SUMS8(32), FCM_SUMS8(40)
#define FCM_D128 FCM_D96, FCM_SUMS8(48), FCM_SUMS8(56)
#define FCM_D160 FCM_D128, FCM_SUMS8(64), FCM_SUMS8(72)
#define FCM_D192 FCM_D160, FCM_SUMS8(80), FCM_SUMS8(88)
#define FCM_D256 FCM_D192, FCM_SUMS8(96), FCM_SUMS8(104), FCM_SUMS8(112), FCM_SUMS8(120)
#define FCM_WGMMA(N, SHAPE, A, B, LAYOUTS, ...)                                                               \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" FCM_R##N \
               "}, " A ", %" #B ", p, 1, 1" LAYOUTS ";}"                                                      \
               : FCM_D##N                                                                                     \
               : __VA_ARGS__, "l"(row_blocks(b, stride) + 2 * half))
#define FCM_WGMMA_SHARED(N, I, J, SHAPE, LAYOUTS) \
  FCM_WGMMA(N, SHAPE, "%" #I, J, LAYOUTS, "l"(row_blocks(a, 512) + 2 * half))
#define FCM_WGMMA_REGISTERS(N, I, J, K, L, M, SHAPE, LAYOUTS)                                                    \
  FCM_WGMMA(N, SHAPE, "{%" #I ", %" #J ", %" #K ", %" #L "}", M, LAYOUTS, "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), \
            "r"(a.r[3]))
#define FCM_WGMMA_N(N, I, J, K, L, M)                                  \
  if constexpr (kN == N) {                                             \
    if constexpr (kRegisters && kHalf)                                 \
      FCM_WGMMA_REGISTERS(N, I, J, K, L, M, "k16.f32.f16.f16", ", 0"); \
    else if constexpr (kRegisters)                                     \
      FCM_WGMMA_REGISTERS(N, I, J, K, L, M, "k8.f32.tf32.tf32", "");   \
    else if constexpr (kHalf)                                          \
      FCM_WGMMA_SHARED(N, I, J, "k16.f32.f16.f16", ", 0, 0");          \
    else                                                               \
      FCM_WGMMA_SHARED(N, I, J, "k8.f32.tf32.tf32", "");               \
  }

// d[64 x N] += a * b: half the channels of a group (`half` 0 or 1) of 64 rows and of N rows at `b`, whose row blocks
// are `stride` bytes apart. Of four warps, warp i has rows 16 * i on, laid over its lanes like mma_half's results. The
// 64 rows start at `a`, or are in registers, a Vec like mma_half's (or mma_tf32's) a0 to a3. Of floats TF32's bits
// alone are read: whoever writes them rounds. `set` tells such registers apart, for the CPU: those of one number may
// not be written while products read them.
template <Type TYPE, int N, class A>
FCM_DEVICE void wgmma(float* d, const A& a, const char* b, int stride, int half, [[maybe_unused]] int set = 0) {
  static_assert(N % 8 == 0, "rows come in row blocks");
  constexpr bool kHalf = TYPE == Type::float16, kRegisters = sizeof(A) == sizeof(Vec);
  constexpr int kN = N >= 256   ? 256
                     : N >= 192 ? 192
                     : N >= 160 ? 160
                     : N >= 128 ? 128
                     : N >= 96  ? 96
                     : N >= 64  ? 64
                     : N >= 48  ? 48
                     : N >= 32  ? 32
                     : N >= 16  ? 16
                                : 8;
#ifdef FCM_WARPGROUPS
  FCM_WGMMA_N(8, 4, 5, 6, 7, 8);
  FCM_WGMMA_N(16, 8, 9, 10, 11, 12);
  FCM_WGMMA_N(32, 16, 17, 18, 19, 20);
  FCM_WGMMA_N(48, 24, 25, 26, 27, 28);
  FCM_WGMMA_N(64, 32, 33, 34, 35, 36);
  FCM_WGMMA_N(96, 48, 49, 50, 51, 52);
  FCM_WGMMA_N(128, 64, 65, 66, 67, 68);
  FCM_WGMMA_N(160, 80, 81, 82, 83, 84);
  FCM_WGMMA_N(192, 96, 97, 98, 99, 100);
  FCM_WGMMA_N(256, 128, 129, 130, 131, 132);
#endif
  if constexpr (N > kN) wgmma<TYPE, N - kN>(d + kN / 2, a, b + kN / 8 * stride, stride, half);
}

// ---- Mathematics

// One instruction each, as what is too small to be normal is taken as zero.
FCM_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FCM_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FCM_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
FCM_DEVICE float tanh(float x) { return ::tanhf(x); }
FCM_DEVICE float erf(float x) { return ::erff(x); }
FCM_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
FCM_DEVICE float minimum(float a, float b) { return fminf(a, b); }
// min(max(x, 0), top), where top >= 0. Order among floats that are not negative is that of their bits, and what is
// negative is so as an integer too.
FCM_DEVICE float clip_to(float top, float x) {
#if __CUDA_ARCH__ >= 900
  u32 d;
  asm("min.relu.s32 %0, %1, %2;" : "=r"(d) : "r"(float_bits(x)), "r"(float_bits(top)));
  return bits_float(d);
#else
  return fminf(fmaxf(x, 0.f), top);
#endif
}

}  // namespace fcm

// The blocks of a cluster share out the middle channels of one tile.
#if __CUDA_ARCH__ >= 900
#define FCM_CLUSTER(SPLIT) __cluster_dims__(1, 1, SPLIT)
#else
#define FCM_CLUSTER(SPLIT)
#endif

#define FCM_KERNEL(NAME, SPEC, BODY)                                                                                  \
  extern "C" __global__ void __launch_bounds__(fcm::threads(SPEC), (SPEC).tile.blocks) FCM_CLUSTER((SPEC).tile.split) \
      NAME(const __grid_constant__ fcm::Params p) {                                                                   \
    BODY(p);                                                                                                          \
  }

#endif
