// What the kernels need of CUDA, for the CPU: found before cuda/primitives.cuh. The threads are run by device.cpp, one
// at a time; wherever one uses memory that others use, another may go on. So orders of steps are tested, while what
// processors do with memory in an order of their own is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return uint2{x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return uint4{x, y, z, w}; }

struct Place {
    u32 x, y;
};
extern Place gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

// Lets another thread go on: always, where a thread may be waiting, now and then, or rarely, amid data.
void pause();
void maybe_pause();
void rarely_pause();
u64 now();
// Waits for all threads of the block; whether `value` was true for any.
bool barrier(bool value, bool votes);
// Waits for all threads of the warp; the values that they brought.
const u32 *exchange(u32 value);
void *shared(size_t bytes);
// Tells the test what is wrong.
void complain(const char *what, const void *at);

// One access of 1 to 8 bytes: no more is promised to be one.
template <class V> V load(const V *at) {
    static_assert(sizeof(V) <= 8, "not one access");
    if ((uintptr_t)at % sizeof(V) != 0) complain("a load that is not aligned", at);
    V value;
    __atomic_load(at, &value, __ATOMIC_RELAXED);
    return value;
}

inline uint4 load_halves(const uint4 *at) {
    if ((uintptr_t)at % 16 != 0) complain("a load that is not aligned", at);
    u64 halves[2];
    halves[0] = load((const u64 *)at);
    rarely_pause();
    halves[1] = load((const u64 *)at + 1);
    uint4 value;
    memcpy(&value, halves, sizeof value);
    return value;
}

}  // namespace emulation

// Kernels of a stream run one after the other here.
inline void wait_for_kernel_before() {}

inline u32 load_volatile(const u32 *at) {
    emulation::pause();
    return emulation::load(at);
}
inline u64 load_volatile(const u64 *at) {
    emulation::pause();
    return emulation::load(at);
}
inline uint4 load_volatile(const uint4 *at) {
    emulation::pause();
    return emulation::load_halves(at);
}
inline void store_volatile(uint4 *at, uint4 value) {
    if ((uintptr_t)at % 16 != 0) emulation::complain("a store that is not aligned", at);
    u64 halves[2];
    memcpy(halves, &value, sizeof value);
    emulation::maybe_pause();
    __atomic_store_n((u64 *)at, halves[0], __ATOMIC_RELAXED);
    emulation::maybe_pause();
    __atomic_store_n((u64 *)at + 1, halves[1], __ATOMIC_RELAXED);
    emulation::maybe_pause();
}
// Promised to be one access, unlike the others of 16 bytes.
inline uint4 load_whole(const uint4 *at) {
    if ((uintptr_t)at % 16 != 0) emulation::complain("a load that is not aligned", at);
    emulation::pause();
    return *at;
}
inline void store_whole(uint4 *at, uint4 value) {
    if ((uintptr_t)at % 16 != 0) emulation::complain("a store that is not aligned", at);
    emulation::maybe_pause();
    *at = value;
    emulation::maybe_pause();
}
inline uint4 load_acquire(const uint4 *at) { return load_volatile(at); }
inline u64 load_acquire(const u64 *at) {
    emulation::pause();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
inline void store_release(u64 *at, u64 value) {
    emulation::maybe_pause();
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
    emulation::maybe_pause();
}
inline void store_relaxed(u64 *at, u64 value) { store_release(at, value); }

template <class V> V load_once(const V *at) {
    emulation::rarely_pause();
    return emulation::load(at);
}
template <> inline uint4 load_once(const uint4 *at) {
    emulation::rarely_pause();
    return emulation::load_halves(at);
}

inline u64 nanoseconds() { return emulation::now(); }
inline u32 lane() { return threadIdx.x % 32; }
template <class T> T &shared_by_block() { return *(T *)emulation::shared(sizeof(T)); }

inline void __threadfence() { emulation::maybe_pause(); }
inline void __threadfence_system() { emulation::maybe_pause(); }
inline void __syncthreads() { emulation::barrier(false, false); }
inline bool __syncthreads_or(bool value) { return emulation::barrier(value, true); }
// Of whole warps only, as the kernels use them.
constexpr u32 WARP = 0xffffffff;
inline void whole(u32 mask) {
    if (mask != WARP) emulation::complain("a part of a warp", nullptr);
}
inline void __syncwarp(u32 mask = WARP) {
    whole(mask);
    emulation::exchange(0);
}
inline u32 __shfl_sync(u32 mask, u32 value, u32 from) {
    whole(mask);
    return emulation::exchange(value)[from];
}
inline u32 __ballot_sync(u32 mask, bool vote) {
    whole(mask);
    const u32 *votes = emulation::exchange(vote);
    u32 bits = 0;
    for (u32 other = 0; other < 32; ++other) bits |= votes[other] << other;
    return bits;
}
inline bool __all_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) == WARP; }
inline u32 __clz(u32 value) { return value == 0 ? 32 : (u32)__builtin_clz(value); }

inline u32 atomicAdd(u32 *at, u32 value) {
    emulation::maybe_pause();
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline u32 count_up(u32 *at) { return atomicAdd(at, 1); }
inline u32 atomicExch(u32 *at, u32 value) {
    emulation::maybe_pause();
    return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

template <class To, class From> To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "not as large");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(u32 bits) { return same_bits<float>(bits); }
inline u32 __float_as_uint(float value) { return same_bits<u32>(value); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }
inline long long __double_as_longlong(double value) { return same_bits<long long>(value); }

inline float widen_half(u16 bits) {
    const u32 magnitude = bits & 0x7fff, sign = (u32)(bits & 0x8000) << 16;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // As a float whose exponent is 112 too small; a subnormal one where the half is.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}
inline u16 narrow_to_half(float value) {
    const u32 bits = __float_as_uint(value);
    const u32 magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return 0x7fff;
    u32 half;
    if (magnitude >= 0x477ff000) {  // 65520
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // 2^-14
        // Beside a half the last place is the smallest subnormal: the addition rounds.
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return (u16)(sign | half);
}
