// Operations on little data, in one step: every rank pushes to all others what they need of it, each 4 bytes beside the
// sequence number. There is no barrier and nothing to clear: two areas take turns, and a rank that is one operation
// ahead has seen a letter of every peer, so all are done with the one before.
#pragma once

#include "reduce.cuh"

// What is only moved, and has no numbers.
struct Byte {
    typedef u8 Bits;
};

// Whether a tensor can be read and written 8 bytes at a time.
template <class T> __device__ __forceinline__ bool in_eights(const View &view) {
    const u64 between = view.rows > 1 ? (view.stride | view.columns) * sizeof(typename T::Bits) : 0;
    return ((view.data | between) & 7) == 0;
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

// A tensor, or columns of it, in pieces of 8 bytes that the threads share.
template <class T> struct Pieces {
    View view;
    u64 total;  // elements
    bool aligned;

    __device__ explicit Pieces(const View &view) : view(view), total(view.rows * view.columns), aligned(in_eights<T>(view)) {}
    __device__ u64 count() const { return (total + Eight<T>::COUNT - 1) / Eight<T>::COUNT; }
    __device__ __forceinline__ void load(Eight<T> &piece, u64 index) const {
        piece.load(view, index * Eight<T>::COUNT, total, aligned);
    }
    __device__ __forceinline__ void store(const Eight<T> &piece, u64 index) const {
        piece.store(view, index * Eight<T>::COUNT, total, aligned);
    }
};

__device__ __forceinline__ u64 first_piece() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 next_piece() { return (u64)gridDim.x * blockDim.x; }

// Where the pieces that go from one rank to another lie behind the inbox.
__device__ __forceinline__ uint4 *pushed(const Call &call, Inbox *inbox) {
    const u64 area = sizeof(Inbox) + (call.sequence() & 1) * call.rank()->small_bytes * 2;
    return (uint4 *)((u8 *)inbox + area);
}

template <class T> __device__ __forceinline__ void push(const Call &call, u32 peer, u64 index, const Eight<T> &piece) {
    const u32 sequence = (u32)call.sequence();
    const uint4 words = make_uint4(piece.vector.x, sequence, piece.vector.y, sequence);
    store_volatile(pushed(call, call.rank()->out[peer]) + index, words);
}

// What one thread knows of the ranks that it meets. The threads of a warp wait together.
struct Company {
    const Call &call;
    const Rank *rank;
    Patience patience;
    u32 sequence;
    u32 known;   // a bit for each rank whose letter has come
    u32 givers;  // a bit for each of them that gives

    __device__ explicit Company(const Call &call)
        : call(call), rank(call.rank()), patience(call), sequence((u32)call.sequence()), known(1u << rank->rank),
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
    __device__ __forceinline__ bool receive_from(u32 peer, u64 index, bool part, uint4 &words) {
        const uint4 *place = pushed(call, rank->in[peer]) + index;
        const bool far = (rank->reached >> peer & 1) == 0;
        bool come = false;
        for (;;) {
            bool alive = true;
            if (!come) {
                if (part) words = load_volatile(place);
                if ((known >> peer & 1) == 0) alive = look_for_letter(peer);
                come = (known >> peer & 1) != 0 && (!part || !gives(peer) || (words.y == sequence && words.w == sequence));
            }
            const u32 waiting = __ballot_sync(WARP, !come);
            if (waiting == 0) return true;
            // In host memory one thread looks until its part is there, before the others look for theirs: looks of all
            // would fill the link and delay what they wait for.
            if (far && lane() == 31 - __clz(waiting) && (known >> peer & 1) != 0) {
                do words = load_volatile(place);
                while ((words.y != sequence || words.w != sequence) && !patience.over(peer));
            }
            if (!come && alive) alive = !patience.over(peer);
            if (!__all_sync(WARP, alive)) return false;
        }
    }
};

// Lets the first block wait for letters, and says whether this warp goes on. Of `far` peers first, to pass them on: all
// blocks would look at host memory one after the other. Of the others last, by ranks that might get nothing from them:
// a rank must not be two operations ahead of a peer. Called by all threads.
__device__ __forceinline__ bool greet(const Call &call, bool far) {
    const Rank *rank = call.rank();
    bool alive = rank->broken == 0;
    const u32 peer = threadIdx.x;
    if (alive && blockIdx.x == 0 && peer < rank->ranks && peer != rank->rank && far == ((rank->reached >> peer & 1) == 0)) {
        uint4 letter;
        alive = read_letter(call, peer, &letter, false);
    }
    // Nobody may leave a warp whose other threads vote.
    return __all_sync(WARP, alive);
}

template <class T> __device__ __forceinline__ void all_reduce_small(const Call &call) {
    const Pieces<T> tensor(call.output(call.columns));
    // On its way while the record is.
    Eight<T> first;
    tensor.load(first, first_piece());
    begin(call);
    const Count count(call);
    const Rank *rank = call.rank();
    announce<false>(call);
#pragma unroll 1
    for (u64 index = first_piece(); index < tensor.count(); index += next_piece()) {
        Eight<T> own = first;
        if (index != first_piece()) tensor.load(own, index);
#pragma unroll 1
        for (u32 hop = 1; hop < rank->ranks; ++hop) {
            // Every rank begins with another peer, so that none is flooded.
            push(call, (rank->rank + hop) % rank->ranks, index, own);
        }
    }
    bool alive = greet(call, true);
    Company company(call);
#pragma unroll 1
    for (u64 index = first_piece(); alive && index - lane() < tensor.count(); index += next_piece()) {
        Pack<T, 8> sum;
        bool begins = true;
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            Eight<T> part = first;
            if (peer != rank->rank) {
                uint4 words;
                alive = company.receive_from(peer, index, index < tensor.count(), words);
                if (!alive) break;
                part.vector = make_uint2(words.x, words.z);
            } else if (index != first_piece()) {
                tensor.load(part, index);
            }
            if (!company.gives(peer)) continue;
            sum.add(part.elements, begins);
            begins = false;
        }
        if (!alive) break;
        Eight<T> result;
        sum.round(result.elements);
        tensor.store(result, index);
    }
    count.end(call);
}

// Each rank pushes every peer's columns to it, and sums its own.
template <class T> __device__ __forceinline__ void reduce_scatter_small(const Call &call) {
    constexpr u32 size = sizeof(typename T::Bits);
    begin(call);
    const Count count(call);
    const Rank *rank = call.rank();
    announce<false>(call);
    const auto columns_of = [&](u32 peer) {
        return Pieces<T>(View{call.me().input + (u64)call.begin[peer] * size, call.rows, call.width(peer), call.me().input_stride});
    };
#pragma unroll 1
    for (u32 hop = 1; call.gives() && hop < rank->ranks; ++hop) {
        const u32 peer = (rank->rank + hop) % rank->ranks;
        const Pieces<T> theirs = columns_of(peer);
#pragma unroll 1
        for (u64 index = first_piece(); index < theirs.count(); index += next_piece()) {
            Eight<T> piece;
            theirs.load(piece, index);
            push(call, peer, index, piece);
        }
    }
    bool alive = greet(call, true);
    Company company(call);
    const Pieces<T> own = columns_of(rank->rank);
    const Pieces<T> target(call.output(call.width(rank->rank)));
#pragma unroll 1
    for (u64 index = first_piece(); alive && call.gets() && index - lane() < target.count(); index += next_piece()) {
        Pack<T, 8> sum;
        bool begins = true;
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            Eight<T> part;
            if (peer != rank->rank) {
                uint4 words;
                alive = company.receive_from(peer, index, index < target.count(), words);
                if (!alive) break;
                part.vector = make_uint2(words.x, words.z);
            }
            if (!company.gives(peer)) continue;
            if (peer == rank->rank) own.load(part, index);
            sum.add(part.elements, begins);
            begins = false;
        }
        if (!alive) break;
        Eight<T> result;
        sum.round(result.elements);
        target.store(result, index);
    }
    if (alive) greet(call, false);
    count.end(call);
}

// Broadcast, gather to a rank, all_gather: who gives pushes its columns, in bytes, to all who may get them.
__device__ __forceinline__ void move_small(const Call &call) {
    begin(call);
    const Count count(call);
    const Rank *rank = call.rank();
    const u32 me = rank->rank;
    announce<false>(call);
    const auto place_of = [&](u32 peer) {
        return Pieces<Byte>(View{call.me().output + call.begin[peer], call.rows, call.width(peer), call.me().output_stride});
    };
    const Pieces<Byte> own(View{call.me().input + call.skip[me], call.rows, call.width(me), call.me().input_stride});
    const Pieces<Byte> here = place_of(me);
    const bool stays = call.gets() && here.view.data != own.view.data;
#pragma unroll 1
    for (u64 index = first_piece(); call.gives() && index < own.count(); index += next_piece()) {
        Eight<Byte> piece;
        own.load(piece, index);
#pragma unroll 1
        for (u32 hop = 1; hop < rank->ranks; ++hop) {
            const u32 peer = (me + hop) % rank->ranks;
            if ((call.targets >> peer & 1) != 0) push(call, peer, index, piece);
        }
        if (stays) here.store(piece, index);
    }
    bool alive = greet(call, true);
    Company company(call);
#pragma unroll 1
    for (u32 hop = 1; alive && call.gets() && hop < rank->ranks; ++hop) {
        const u32 peer = (me + hop) % rank->ranks;
        const Pieces<Byte> place = place_of(peer);
#pragma unroll 1
        for (u64 index = first_piece(); alive && index - lane() < place.count(); index += next_piece()) {
            uint4 words;
            alive = company.receive_from(peer, index, index < place.count(), words);
            if (!alive || !company.gives(peer)) break;
            Eight<Byte> piece;
            piece.vector = make_uint2(words.x, words.z);
            place.store(piece, index);
        }
    }
    if (alive) greet(call, false);
    count.end(call);
}
