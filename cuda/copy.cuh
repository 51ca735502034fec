// Copies of rows between ranks.
#pragma once

#include "protocol.cuh"

// The type of one access of so many bytes.
template <u32 BYTES> struct Bytes;
template <> struct Bytes<1> { typedef u8 Type; };
template <> struct Bytes<2> { typedef u16 Type; };
template <> struct Bytes<4> { typedef u32 Type; };
template <> struct Bytes<8> { typedef uint2 Type; };
template <> struct Bytes<16> { typedef uint4 Type; };

// Where the element `index` of rows of `columns` lies whose beginnings are `stride` apart. Not inlined: it divides, which
// is long, and is needed where there are gaps between rows only.
__device__ __noinline__ u64 scattered(u64 index, u64 columns, u64 stride) {
    const u64 row = index / columns;
    return row * stride + (index - row * columns);
}

// Rows of bytes.
struct Rows {
    u64 to;
    u64 to_stride;
    u64 from;
    u64 from_stride;
    u64 rows;
    u64 width;
};

template <u32 BYTES> __device__ __forceinline__ void copy_rows_by(const Rows &rows) {
    typedef typename Bytes<BYTES>::Type V;
    const u64 across = rows.width / BYTES;
    const u64 total = rows.rows * across;
    const u64 step = (u64)gridDim.x * blockDim.x;
    const bool dense = across * BYTES == rows.to_stride && across * BYTES == rows.from_stride;
    constexpr u32 AT_ONCE = 4;
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += AT_ONCE * step) {
        V values[AT_ONCE];
        u64 offsets[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            const u64 index = at + i * step;
            if (index >= total) continue;
            const u64 row = dense ? 0 : index / across;
            const u64 column = dense ? index : index - row * across;
            values[i] = load_once((const V *)(rows.from + row * rows.from_stride + column * BYTES));
            offsets[i] = row * rows.to_stride + column * BYTES;
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            if (at + i * step < total) *(V *)(rows.to + offsets[i]) = values[i];
        }
    }
}

// Copies rows of bytes with the widest access that all addresses allow.
__device__ __noinline__ void copy_rows(const Rows &rows) {
    u64 bits = rows.to | rows.from | rows.width;
    if (rows.rows > 1) bits |= rows.to_stride | rows.from_stride;
    if ((bits & 15) == 0) {
        copy_rows_by<16>(rows);
    } else if ((bits & 3) == 0) {
        copy_rows_by<4>(rows);
    } else if ((bits & 1) == 0) {
        copy_rows_by<2>(rows);
    } else {
        copy_rows_by<1>(rows);
    }
}

// Every rank that gets anything takes the columns of every rank that gives and is in its reach, straight from its
// tensor. Columns are counted in bytes here.
__device__ __forceinline__ void take_direct(const Call &call, const Meeting &meeting) {
    if (!call.gets()) return;
#pragma unroll 1
    for (u32 hop = 0; hop < call.rank()->ranks; ++hop) {
        // Every rank begins with its own part and goes on with the next one's.
        const u32 peer = (call.rank()->rank + hop) % call.rank()->ranks;
        if (!meeting.gives(peer) || call.width(peer) == 0) continue;
        const Peer &about = meeting.peers[peer];
        const bool here = peer == call.rank()->rank;
        if (!here && ((call.rank()->reaches >> peer & 1) == 0 || (about.role & PLAIN) == 0)) continue;
        Rows rows;
        rows.to = call.me().output + call.begin[peer];
        rows.to_stride = call.me().output_stride;
        rows.from = about.data + call.skip[peer];
        rows.from_stride = about.stride;
        rows.rows = call.rows;
        rows.width = call.width(peer);
        if (rows.to != rows.from) copy_rows(rows);
    }
}
