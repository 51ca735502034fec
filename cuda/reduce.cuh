// Sums over ranks, always in the order of the ranks and rounded once, so that every rank ends with the same bits.
#pragma once

#include "copy.cuh"
#include "numbers.cuh"

// Up to so many bytes are added by one thread at a time.
constexpr u32 WIDE = 16;

// Where the linear element `index` of a tensor lies.
template <class Bits> __device__ __forceinline__ Bits *element(u64 data, u64 columns, u64 stride, u64 index) {
    return (Bits *)data + (columns == stride ? index : scattered(index, columns, stride));
}

// What one rank sums for others: of the elements [from, to) of the whole, each from all who give, written to all
// who get.
template <class T, u32 BYTES>
__device__ __noinline__ void reduce_range(const Call &call, const Meeting &meeting, u64 from, u64 to) {
    typedef typename T::Bits Bits;
    constexpr u32 count = BYTES / sizeof(Bits);
    const u32 ranks = call.rank()->ranks;
    const u64 columns = call.columns;
    for (u64 at = from + ((u64)blockIdx.x * blockDim.x + threadIdx.x) * count; at < to;
         at += (u64)gridDim.x * blockDim.x * count) {
        union {
            typename Bytes<BYTES>::Type vector;
            Bits elements[count];
        } value;
        Pack<T, BYTES> sum;
        bool first = true;
#pragma unroll 1
        for (u32 peer = 0; peer < ranks; ++peer) {
            if (!meeting.gives(peer)) continue;
            const Peer &about = meeting.peers[peer];
            value.vector = load_once((const typename Bytes<BYTES>::Type *)element<Bits>(
                about.data, columns, about.stride, at));
            sum.add(value.elements, first);
            first = false;
        }
        sum.round(value.elements);
#pragma unroll 1
        for (u32 peer = 0; peer < ranks; ++peer) {
            if (!meeting.gets(peer)) continue;
            const Peer &about = meeting.peers[peer];
            *(typename Bytes<BYTES>::Type *)element<Bits>(about.data, columns, about.stride, at) = value.vector;
        }
    }
}

// A large sum in place: each rank sums its share of the elements, reading from all and writing to all. No element
// is touched by two ranks, so it needs no memory besides.
template <class T> __device__ __forceinline__ void all_reduce_in_place(const Call &call, Meeting &meeting) {
    typedef typename T::Bits Bits;
    const Rank *rank = call.rank();
    const View view = call.output(call.columns);
    const u64 total = view.rows * view.columns;
    u32 present = 0, index = 0;
    u64 bits = view.rows > 1 ? view.columns * sizeof(Bits) : 0;
#pragma unroll 1
    for (u32 peer = 0; peer < rank->ranks; ++peer) {
        if (!meeting.present(peer)) continue;
        if (peer < rank->rank) ++index;
        ++present;
        const Peer &about = meeting.peers[peer];
        bits |= about.data | (view.rows > 1 ? about.stride * sizeof(Bits) : 0);
    }
    constexpr u32 count = WIDE / sizeof(Bits);
    // Shares end at 128 bytes, so that no cache line is written by two ranks.
    constexpr u64 line = 128 / sizeof(Bits);
    const u64 lines = (total + line - 1) / line;
    const u64 from = lines * index / present * line;
    u64 to = lines * (index + 1) / present * line;
    if (to > total) to = total;
    if ((bits & (WIDE - 1)) == 0) {
        const u64 whole = to < from ? from : from + (to - from) / count * count;
        reduce_range<T, WIDE>(call, meeting, from, whole);
        reduce_range<T, sizeof(Bits)>(call, meeting, whole, to);
    } else {
        reduce_range<T, sizeof(Bits)>(call, meeting, from, to);
    }
}

// The columns of this rank, summed from all who give.
template <class T, u32 BYTES>
__device__ __noinline__ void reduce_own_columns(const Call &call, const Meeting &meeting) {
    typedef typename T::Bits Bits;
    typedef typename Bytes<BYTES>::Type Vector;
    constexpr u32 count = BYTES / sizeof(Bits);
    const View view = call.output(call.width(call.rank()->rank));
    const u64 begin = call.begin[call.rank()->rank];
    const u64 across = view.columns / count;
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < view.rows * across;
         at += (u64)gridDim.x * blockDim.x) {
        const u64 row = at / across, column = at % across * count;
        union {
            Vector vector;
            Bits elements[count];
        } value;
        Pack<T, BYTES> sum;
        bool first = true;
#pragma unroll 1
        for (u32 peer = 0; peer < call.rank()->ranks; ++peer) {
            if (!meeting.gives(peer)) continue;
            const Peer &about = meeting.peers[peer];
            value.vector = load_once((const Vector *)((const Bits *)about.data + row * about.stride + begin + column));
            sum.add(value.elements, first);
            first = false;
        }
        sum.round(value.elements);
        *(Vector *)((Bits *)view.data + row * view.stride + column) = value.vector;
    }
}

template <class T> __device__ __forceinline__ void reduce_scatter_direct(const Call &call, const Meeting &meeting) {
    typedef typename T::Bits Bits;
    if (!call.gets()) return;
    const View view = call.output(call.width(call.rank()->rank));
    u64 bits = view.data | (view.stride | view.columns | call.begin[call.rank()->rank]) * sizeof(Bits);
#pragma unroll 1
    for (u32 peer = 0; peer < call.rank()->ranks; ++peer) {
        if (meeting.gives(peer)) bits |= meeting.peers[peer].data | meeting.peers[peer].stride * sizeof(Bits);
    }
    if ((bits & (WIDE - 1)) == 0) {
        reduce_own_columns<T, WIDE>(call, meeting);
    } else {
        reduce_own_columns<T, sizeof(Bits)>(call, meeting);
    }
}

// Adds to the target this rank's columns of the source. Ranks do not meet, and it knows none: the first entry of the
// columns is the rank's.
template <class T> __device__ __forceinline__ void add_residual(const Call &call) {
    typedef typename T::Bits Bits;
    const View target = call.output(call.width(0));
    const View source = call.input(call.columns);
#pragma unroll 1
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < target.rows * target.columns;
         at += (u64)gridDim.x * blockDim.x) {
        const u64 row = at / target.columns, column = at % target.columns;
        Bits *place = (Bits *)target.data + row * target.stride + column;
        const Bits addend = ((const Bits *)source.data)[row * source.stride + call.begin[0] + column];
        *place = T::narrow(T::widen(*place) + T::widen(addend));
    }
}
