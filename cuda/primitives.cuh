// What C++ can't say: single accesses of memory that others use, the clock, lanes, shared memory, conversions. All other
// files are C++ with CUDA's own functions and qualifiers. They include this one in angle brackets, so that
// tests/kernels, which has another one for CPUs, comes first where it is asked to.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Stands in every kernel that may be started while the one before it on its stream still ends: nothing in memory but the
// parameters may be used before it. The host puts `griddepcontrol.wait` in the place of the remark where devices know that instruction
// (src/comm/cuda/text.rs); compute_70, for which this is compiled, does not.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("// tp_rs: wait for the kernel before" ::: "memory");
}

__device__ __forceinline__ u32 load_volatile(const u32 *at) {
    u32 value;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ u64 load_volatile(const u64 *at) {
    u64 value;
    asm volatile("ld.volatile.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_volatile(const uint4 *at) {
    uint4 value;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at)
                 : "memory");
    return value;
}

__device__ __forceinline__ void store_volatile(uint4 *at, uint4 value) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// 16 aligned bytes in one access: whoever sees one of the words sees all. PTX models a vector as accesses of its elements
// in any order, but promises that a scalar of 128 bits is one access from sm_70 on (`ld` and `st` of `.b128`, PTX ISA 8.3,
// with the scope `.sys` 8.4). The text for drivers of CUDA 12.2 is PTX 8.2 and can't name that type; ptxas 12.9 makes the same
// instruction of both, from sm_70 to sm_120.
__device__ __forceinline__ uint4 load_whole(const uint4 *at) { return load_volatile(at); }
__device__ __forceinline__ void store_whole(uint4 *at, uint4 value) { store_volatile(at, value); }

// A release and an acquire order also what the other threads of a block wrote before a barrier with the thread that
// makes them, or read after one (they are cumulative). A fence in every thread would do no more and takes far longer:
// fences of the system are served one by one where writes to host memory are under way.
__device__ __forceinline__ u64 load_acquire(const u64 *at) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_acquire(const uint4 *at) {
    uint4 value;
    asm volatile("ld.acquire.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at)
                 : "memory");
    return value;
}

// Adds one, in an access that is both a release and an acquire among the device's threads.
__device__ __forceinline__ u32 count_up(u32 *at) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
}

__device__ __forceinline__ void store_release(u64 *at, u64 value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed(u64 *at, u64 value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// Reads of what is needed once, and which another rank may have written while this kernel runs.
template <class V> __device__ __forceinline__ V load_once(const V *at) { return *(const volatile V *)at; }
template <> __device__ __forceinline__ uint2 load_once(const uint2 *at) {
    uint2 value;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(at) : "memory");
    return value;
}
template <> __device__ __forceinline__ uint4 load_once(const uint4 *at) {
    uint4 value;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at)
                 : "memory");
    return value;
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
    return value;
}

// All threads of a warp. Votes and exchanges are for whole warps only: those of the threads that `__activemask` happens to
// find together have been seen to wait for each other forever.
constexpr u32 WARP = 0xffffffff;

// The thread's place in its warp.
__device__ __forceinline__ u32 lane() {
    u32 value;
    asm("mov.u32 %0, %laneid;" : "=r"(value));
    return value;
}

// The one `T` that the threads of a block share.
template <class T> __device__ __forceinline__ T &shared_by_block() {
    __shared__ T value;
    return value;
}

__device__ __forceinline__ float widen_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ u16 narrow_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
