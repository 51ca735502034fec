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

// Positions that one thread sums at once. Sums of bytes widen to so much that there is room for no more.
template <class T, u32 BYTES> constexpr u32 SUMMED_AT_ONCE = BYTES == WIDE && sizeof(typename T::Bits) > 1 ? 2 : 1;

// Sums of `BYTES` at several positions of a thread, of which the first `positions` are wanted. `place` says where a rank
// has the position of that number. What two ranks have is loaded at all positions before any of it is added: a load from
// another device takes about two microseconds, and all of them are under way at once then.
template <class T, u32 BYTES, u32 N> struct Summing {
    typedef typename T::Bits Bits;
    typedef typename Bytes<BYTES>::Type Vector;
    union Value {
        Vector vector;
        Bits elements[BYTES / sizeof(Bits)];
    };
    Value results[N];

    template <class Place>
    __device__ __forceinline__ Summing(const Meeting &meeting, u32 ranks, u32 positions, Place place) {
        const auto giver_from = [&](u32 peer) {
            while (peer < ranks && !meeting.gives(peer)) ++peer;
            return peer;
        };
        Pack<T, BYTES> sums[N];
        Value second[N];
        bool first = true;
        u32 peer = giver_from(0);
#pragma unroll 1
        while (peer < ranks) {
            const u32 other = giver_from(peer + 1);
#pragma unroll
            for (u32 i = 0; i < N; ++i) {
                if (i < positions) results[i].vector = load_once((const Vector *)place(meeting.peers[peer], i));
            }
#pragma unroll
            for (u32 i = 0; i < N; ++i) {
                if (i < positions && other < ranks) second[i].vector = load_once((const Vector *)place(meeting.peers[other], i));
            }
#pragma unroll
            for (u32 i = 0; i < N; ++i) sums[i].add(results[i].elements, first);
            first = false;
            if (other >= ranks) break;
#pragma unroll
            for (u32 i = 0; i < N; ++i) sums[i].add(second[i].elements, false);
            peer = giver_from(other + 1);
        }
#pragma unroll
        for (u32 i = 0; i < N; ++i) sums[i].round(results[i].elements);
    }
};

// What one rank sums for others: of the elements [from, to) of the whole, each from all who give, written to all
// who get.
template <class T, u32 BYTES>
__device__ __noinline__ void reduce_range(const Call &call, const Meeting &meeting, u64 from, u64 to) {
    typedef typename T::Bits Bits;
    typedef typename Bytes<BYTES>::Type Vector;
    constexpr u32 count = BYTES / sizeof(Bits), at_once = SUMMED_AT_ONCE<T, BYTES>;
    const u32 ranks = call.rank()->ranks;
    const u64 columns = call.columns;
    const u64 step = (u64)gridDim.x * blockDim.x * count;
    for (u64 at = from + ((u64)blockIdx.x * blockDim.x + threadIdx.x) * count; at < to; at += at_once * step) {
        u32 positions = 1;
        while (positions < at_once && at + positions * step < to) ++positions;
        const auto place = [&](const Peer &about, u32 i) {
            return element<Bits>(about.data, columns, about.stride, at + i * step);
        };
        const Summing<T, BYTES, at_once> sum(meeting, ranks, positions, place);
#pragma unroll 1
        for (u32 peer = 0; peer < ranks; ++peer) {
            if (!meeting.gets(peer)) continue;
#pragma unroll
            for (u32 i = 0; i < at_once; ++i) {
                if (i < positions) *(Vector *)place(meeting.peers[peer], i) = sum.results[i].vector;
            }
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
    constexpr u32 count = BYTES / sizeof(Bits), at_once = SUMMED_AT_ONCE<T, BYTES>;
    const View view = call.output(call.width(call.rank()->rank));
    const u64 begin = call.begin[call.rank()->rank];
    const u64 across = view.columns / count, total = view.rows * across;
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += at_once * step) {
        u64 rows[at_once], columns[at_once];
        u32 positions = 0;
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) {
            if (at + i * step >= total) continue;
            rows[i] = (at + i * step) / across;
            columns[i] = (at + i * step - rows[i] * across) * count;
            ++positions;
        }
        const Summing<T, BYTES, at_once> sum(meeting, call.rank()->ranks, positions, [&](const Peer &about, u32 i) {
            return (const Bits *)about.data + rows[i] * about.stride + begin + columns[i];
        });
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) {
            if (i >= positions) continue;
            *(Vector *)((Bits *)view.data + rows[i] * view.stride + columns[i]) = sum.results[i].vector;
        }
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
