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

// Eight bytes of a tensor, from its element `first` on; what lies behind its end is zero.
template <class T> struct Eight {
    static constexpr u32 COUNT = 8 / sizeof(typename T::Bits);
    union {
        uint2 vector;
        typename T::Bits elements[COUNT];
    };

    __device__ __forceinline__ void load(const View &view, u64 first, u64 total, bool aligned) {
        if (aligned && first + COUNT <= total) {
            vector = *element<uint2>(view.data, view.columns / COUNT, view.stride / COUNT, first / COUNT);
            return;
        }
        u64 word = 0;
#pragma unroll 1
        for (u32 i = 0; i < COUNT && first + i < total; ++i) {
            const u64 bits = *element<typename T::Bits>(view.data, view.columns, view.stride, first + i);
            word |= bits << (8 * sizeof(typename T::Bits) * i);
        }
        vector = make_uint2((u32)word, (u32)(word >> 32));
    }

    __device__ __forceinline__ void store(const View &view, u64 first, u64 total, bool aligned) const {
        if (aligned && first + COUNT <= total) {
            *element<uint2>(view.data, view.columns / COUNT, view.stride / COUNT, first / COUNT) = vector;
            return;
        }
        const u64 word = (u64)vector.y << 32 | vector.x;
#pragma unroll 1
        for (u32 i = 0; i < COUNT && first + i < total; ++i) {
            *element<typename T::Bits>(view.data, view.columns, view.stride, first + i) =
                (typename T::Bits)(word >> (8 * sizeof(typename T::Bits) * i));
        }
    }
};

// What one thread knows of the ranks that a small sum meets. The threads of a warp wait together.
struct Company {
    const Call &call;
    Rank *rank;
    Patience patience;
    u32 sequence;
    u32 known;   // a bit for each rank whose letter has come
    u32 givers;  // a bit for each of them that gives

    __device__ Company(const Call &call, u32 sequence)
        : call(call), rank(call.rank()), patience(call), sequence(sequence), known(1u << rank->rank),
          givers(call.gives() ? known : 0) {}

    __device__ bool gives(u32 peer) const { return (givers >> peer & 1) != 0; }

    // Looks for a peer's letter. False: the peer made another call.
    __device__ __forceinline__ bool look_for_letter(u32 peer) {
        const uint4 what = load_volatile((const uint4 *)&rank->seen[peer][sequence & 1]);
        if (what.y != sequence || what.w != sequence) return true;
        if (!agrees(call, peer, what)) return false;
        known |= 1u << peer;
        if ((what.z & GIVES) != 0) givers |= 1u << peer;
        return true;
    }

    // Waits for what a peer pushed for each thread that has a `part`, if the peer gives anything. The letter is looked
    // for at the same time: before it has come, nobody knows whether the peer made the same call. Called by whole
    // warps, whose threads all return the same.
    __device__ __forceinline__ bool receive_from(u32 peer, const uint4 *pushed, bool part, uint4 &words) {
        const bool far = (rank->reached >> peer & 1) == 0;
        bool come = false;
        for (;;) {
            bool alive = true;
            if (!come) {
                if (part) words = load_volatile(pushed);
                if ((known >> peer & 1) == 0) alive = look_for_letter(peer);
                come = (known >> peer & 1) != 0 && (!part || !gives(peer) || (words.y == sequence && words.w == sequence));
            }
            const u32 waiting = __ballot_sync(WARP, !come);
            if (waiting == 0) return true;
            // In host memory one thread looks until its part is there, before the others look for theirs: looks of all
            // would fill the link and delay what they wait for.
            if (far && lane() == 31 - __clz(waiting) && (known >> peer & 1) != 0) {
                do words = load_volatile(pushed);
                while ((words.y != sequence || words.w != sequence) && !patience.over(peer));
            }
            if (!come && alive) alive = !patience.over(peer);
            if (!__all_sync(WARP, alive)) return false;
        }
    }
};

// A small sum in one step: every rank pushes its tensor to all others, each 4 bytes beside the sequence number.
// There is no barrier and nothing to clear: two areas take turns, and a rank that is one operation ahead has seen
// that all peers are done with the one before.
template <class T> __device__ __forceinline__ void all_reduce_small(const Call &call) {
    Rank *rank = call.rank();
    const u64 whole = announce<false>(call);
    const u32 sequence = (u32)whole;
    const View view = call.output(call.columns);
    const u64 total = view.rows * view.columns;
    constexpr u32 count = Eight<T>::COUNT;
    const u64 packs = (total + count - 1) / count;
    const u64 step = (u64)gridDim.x * blockDim.x;
    const u64 mine = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 area = sizeof(Inbox) + (sequence & 1) * rank->small_bytes * 2;
    const bool aligned = ((view.data | (view.rows > 1 ? view.stride * sizeof(typename T::Bits) : 0) |
                           (view.rows > 1 ? view.columns * sizeof(typename T::Bits) : 0)) &
                          7) == 0;

#pragma unroll 1
    for (u64 pack = mine; pack < packs; pack += step) {
        Eight<T> own;
        own.load(view, pack * count, total, aligned);
        const uint4 words = make_uint4(own.vector.x, sequence, own.vector.y, sequence);
#pragma unroll 1
        for (u32 hop = 1; hop < rank->ranks; ++hop) {
            // Every rank begins with another peer, so that none is flooded.
            const u32 peer = (rank->rank + hop) % rank->ranks;
            store_volatile((uint4 *)((u8 *)rank->out[peer] + area) + pack, words);
        }
    }
    // Nobody may leave a warp whose other threads vote.
    bool alive = load_volatile(&rank->broken) == 0;
    const u32 writer = threadIdx.x;
    if (alive && blockIdx.x == 0 && writer < rank->ranks && (rank->reached >> writer & 1) == 0 && writer != rank->rank) {
        uint4 letter;
        alive = read_letter(call, sequence, writer, &letter, false);
    }
    alive = __all_sync(WARP, alive);
    Company company(call, sequence);
#pragma unroll 1
    for (u64 pack = mine; alive && pack - lane() < packs; pack += step) {
        Pack<T, 8> sum;
        bool first = true;
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            Eight<T> part;
            if (peer == rank->rank) {
                if (!call.gives()) continue;
                part.load(view, pack * count, total, aligned);
            } else {
                uint4 words;
                const uint4 *pushed = (const uint4 *)((u8 *)rank->in[peer] + area) + pack;
                alive = company.receive_from(peer, pushed, pack < packs, words);
                if (!alive) break;
                if (!company.gives(peer)) continue;
                part.vector = make_uint2(words.x, words.z);
            }
            sum.add(part.elements, first);
            first = false;
        }
        if (!alive) break;
        Eight<T> result;
        sum.round(result.elements);
        result.store(view, pack * count, total, aligned);
    }
    leave(call, whole, nullptr);
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
    Rank *rank = call.rank();
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
