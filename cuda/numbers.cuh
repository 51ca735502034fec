// Element types: to and from the type that sums are made in, float, or double for doubles.
//
// Rounding is to nearest, ties to even. Which values overflow to what is as in src/comm/dtype.rs, whose results
// these functions give bit for bit.
#pragma once

#include "protocol.cuh"

struct Double {
    typedef u64 Bits;
    typedef double Sum;
    static __device__ __forceinline__ double widen(u64 bits) { return __longlong_as_double((long long)bits); }
    static __device__ __forceinline__ u64 narrow(double value) { return (u64)__double_as_longlong(value); }
};

struct Float {
    typedef u32 Bits;
    typedef float Sum;
    static __device__ __forceinline__ float widen(u32 bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ u32 narrow(float value) { return __float_as_uint(value); }
};

struct Half {
    typedef u16 Bits;
    typedef float Sum;
    static __device__ __forceinline__ float widen(u16 bits) { return widen_half(bits); }
    static __device__ __forceinline__ u16 narrow(float value) { return narrow_to_half(value); }
};

struct BrainFloat {
    typedef u16 Bits;
    typedef float Sum;
    static __device__ __forceinline__ float widen(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static __device__ __forceinline__ u16 narrow(float value) {
        const u32 bits = __float_as_uint(value);
        const u32 nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN whose upper bits are zero would round to infinity.
        return (u16)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest);
    }
};

// Floats of one byte.
template <u32 BIAS, u32 MANTISSA, u32 OVERFLOW_FROM, u32 OVERFLOW, u32 SPECIAL_FROM> struct Small {
    typedef u8 Bits;
    typedef float Sum;
    static __device__ __forceinline__ float widen(u8 bits) {
        const u32 magnitude = bits & 0x7f;
        const u32 sign = (u32)(bits & 0x80) << 24;
        const u32 shifted = magnitude << (23 - MANTISSA);
        const u32 one = (128 - BIAS) << 23;
        // As the mantissa of the smallest normal number, less that number.
        const float subnormal = __uint_as_float(shifted + one) - __uint_as_float(one);
        const u32 finite =
            magnitude >> MANTISSA == 0 ? __float_as_uint(subnormal) : shifted + ((127 - BIAS) << 23);
        return __uint_as_float(sign | (magnitude >= SPECIAL_FROM ? shifted | (0xffu << 23) : finite));
    }
    static __device__ __forceinline__ u8 narrow(float value) {
        const u32 bits = __float_as_uint(value);
        const u32 magnitude = bits & 0x7fffffff;
        constexpr u32 dropped = 23 - MANTISSA;
        // Beside this addend a float's last place is the format's smallest subnormal: the addition rounds.
        const u32 addend = (128 - BIAS + dropped) << 23;
        const u32 subnormal =
            __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(addend)) - addend;
        const u32 normal =
            (magnitude - ((127 - BIAS) << 23) + (1u << (dropped - 1)) - 1 + ((magnitude >> dropped) & 1)) >> dropped;
        const u32 finite = magnitude < (128 - BIAS) << 23 ? subnormal : normal;
        const u32 number = magnitude >= OVERFLOW_FROM ? OVERFLOW : finite;
        return (u8)((magnitude > 0x7f800000 ? 0x7f : number) | ((bits >> 24) & 0x80));
    }
};

typedef Small<7, 3, 0x43f00000 /* 480 */, 0x7f, 0x7f> E4M3;
typedef Small<15, 2, 0x47800000 /* 65536 */, 0x7c, 0x7c> E5M2;

// Elements in `BYTES` bytes, as they are added up. The first addend replaces what was there, so that a sum of
// negative zeros stays one.
template <class T, u32 BYTES> struct Pack {
    static constexpr u32 COUNT = BYTES / sizeof(typename T::Bits);
    // Sums of bytes are rare, and their conversions long: unrolled they would be half of the text to compile.
    static constexpr u32 UNROLLED = sizeof(typename T::Bits) == 1 ? 1 : COUNT;
    typename T::Sum sum[COUNT];

    __device__ __forceinline__ void add(const typename T::Bits *bits, bool first) {
#pragma unroll UNROLLED
        for (u32 i = 0; i < COUNT; ++i) {
            const typename T::Sum value = T::widen(bits[i]);
            sum[i] = first ? value : sum[i] + value;
        }
    }
    __device__ __forceinline__ void round(typename T::Bits *bits) const {
#pragma unroll UNROLLED
        for (u32 i = 0; i < COUNT; ++i) bits[i] = T::narrow(sum[i]);
    }
};
