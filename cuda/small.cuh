// Operations on little data, in one step: every rank pushes to all others what they need of it, in pieces that are their
// own flags. There is no barrier and nothing to clear: two areas take turns, and a rank that is one operation
// ahead has seen a letter of every peer, so all are done with the one before. The rank's record is asked for first, the
// first pieces are loaded while it comes, and what a rank keeps is loaded when all else is on its way.
#pragma once

#include "pieces.cuh"
#include "reduce.cuh"

// Pieces that a thread has under way where there are several for it. Where one is enough for each thread, code for one
// is run: the longer one takes half a microsecond more, of the four that the smallest operations take. Sums of bytes
// widen to so much that there is room for no more.
template <class T> constexpr u32 AT_ONCE = sizeof(typename T::Bits) > 1 ? 3 : 1;
constexpr u32 MOVED_AT_ONCE = 3;

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

    // Waits for the pieces of `count` that a peer pushed for each thread, from `first` on, if the peer gives anything. The
    // letter is looked for at the same time: before it has come, nobody knows whether the peer made the same call. Called
    // by whole warps, whose threads all return the same.
    template <u32 HELD>
    __device__ __forceinline__ bool receive_from(u32 peer, u32 first, u32 count, uint4 (&pieces)[HELD]) {
        const uint4 *place = pushed(call, rank->in[peer]) + first;
        const bool far = (rank->reached >> peer & 1) == 0;
        u32 missing = 0;
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            if (first + i * next_piece() < count) missing |= 1u << i;
        }
        bool come = false;
        for (;;) {
            bool alive = true;
            if (!come) {
#pragma unroll
                for (u32 i = 0; i < HELD; ++i) {
                    if ((missing >> i & 1) != 0) pieces[i] = load_whole(place + i * next_piece());
                }
                if ((known >> peer & 1) == 0) alive = look_for_letter(peer);
#pragma unroll
                for (u32 i = 0; i < HELD; ++i) {
                    if ((missing >> i & 1) != 0 && pieces[i].w == sequence) missing &= ~(1u << i);
                }
                come = (known >> peer & 1) != 0 && (missing == 0 || !gives(peer));
            }
            const u32 waiting = __ballot_sync(WARP, !come);
            if (waiting == 0) return true;
            // In host memory one thread looks until its part is there, before the others look for theirs: looks of all
            // would fill the link and delay what they wait for.
            if (far && lane() == 31 - __clz(waiting) && (known >> peer & 1) != 0) {
                const uint4 *last = place + (31 - __clz(missing)) * next_piece();
                while (load_whole(last).w != sequence && !patience.over(peer)) {}
            }
            if (!come && alive) alive = !patience.over(peer);
            if (!__all_sync(WARP, alive)) return false;
        }
    }
};

// Lets the first block wait for letters, and says whether this warp goes on. Of `far` peers first, to pass them on: all
// blocks would look at host memory one after the other. Of the others last, by ranks that might get nothing from them:
// a rank must not be two operations ahead of a peer. `known`: a bit for each rank whose letter this warp has seen, which
// is not looked at again. Called by all threads.
__device__ __forceinline__ bool greet(const Call &call, bool far, u32 known) {
    const Rank *rank = call.rank();
    bool alive = rank->broken == 0;
    const u32 peer = threadIdx.x;
    const bool wanted = blockIdx.x == 0 && peer < rank->ranks && peer != rank->rank && (known >> peer & 1) == 0;
    if (alive && wanted && far == ((rank->reached >> peer & 1) == 0)) {
        uint4 letter;
        alive = read_letter(call, peer, &letter, false);
    }
    // Nobody may leave a warp whose other threads vote.
    return __all_sync(WARP, alive);
}

// Adds one rank's pieces to sums that begin with the first rank that gives.
template <class T, u32 HELD> struct Sums {
    Pack<T, Piece<T>::BYTES> sums[HELD];
    bool begins = true;

    __device__ __forceinline__ void add(const Batch<T, HELD> &part) {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            if constexpr (Piece<T>::COUNT == 1) {
                const u64 element = part.pieces[i].element();
                sums[i].add(&element, begins);
            } else {
                sums[i].add(part.pieces[i].elements, begins);
            }
        }
        begins = false;
    }
    __device__ __forceinline__ void round(Batch<T, HELD> &result) const {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            if constexpr (Piece<T>::COUNT == 1) {
                u64 element;
                sums[i].round(&element);
                result.pieces[i].set(element);
            } else {
                sums[i].round(result.pieces[i].elements);
            }
        }
    }
};

// The most pieces that go from one rank to another, where columns are divided.
template <class T> __device__ __forceinline__ u32 most_pieces(const Call &call) {
    return Pieces<T>(View{0, call.rows, call.widest, call.widest}).count();
}

template <class T, u32 HELD>
__device__ __forceinline__ void all_reduce_pushed(const Call &call, const Fetch &record, const Pieces<T> &tensor) {
    typedef Batch<T, HELD> Held;
    Held first = {};
    first.load(tensor, first_piece());
    record.share();
    const Count count(call);
    const Rank *rank = call.rank();
    announce<false>(call);
#pragma unroll 1
    for (u32 index = first_piece(); index < tensor.count(); index += Held::step()) {
        Held own = first;
        if (index != first_piece()) own.load(tensor, index);
#pragma unroll 1
        for (u32 hop = 1; hop < rank->ranks; ++hop) {
            // Every rank begins with another peer, so that none is flooded.
            Inbox *inbox = rank->out[call.after(hop)];
            own.push(pushed(call, inbox), index, tensor.count(), (u32)call.sequence());
        }
    }
    bool alive = greet(call, true, 0);
    Company company(call);
#pragma unroll 1
    for (u32 index = first_piece(); alive && index - lane() < tensor.count(); index += Held::step()) {
        Sums<T, HELD> sums;
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            Held part = first;
            if (peer != rank->rank) {
                uint4 come[HELD];
                alive = company.receive_from(peer, index, tensor.count(), come);
                if (!alive) break;
                part.take(come);
            } else if (index != first_piece()) {
                part.load(tensor, index);
            }
            if (company.gives(peer)) sums.add(part);
        }
        if (!alive) break;
        Held result;
        sums.round(result);
        result.store(tensor, index);
    }
    count.end(call);
}

template <class T> __device__ __forceinline__ void all_reduce_small(const Call &call) {
    const Pieces<T> tensor(call.output(call.columns));
    wait_for_kernel_before();
    if (!call.gives() && !call.gets()) return only_come(call);
    const Fetch record(call);
    if (AT_ONCE<T> == 1 || tensor.count() <= next_piece()) return all_reduce_pushed<T, 1>(call, record, tensor);
    all_reduce_pushed<T, AT_ONCE<T>>(call, record, tensor);
}

// What a rank gives of the columns that another one sums.
template <class T> __device__ __forceinline__ Pieces<T> columns_of(const Call &call, u32 peer) {
    constexpr u32 size = sizeof(typename T::Bits);
    return Pieces<T>(View{call.me().input + (u64)call.begin[peer] * size, call.rows, call.width(peer), call.me().input_stride});
}

// Each rank pushes every peer's columns to it, and sums its own. `theirs`: those of the next rank.
template <class T, u32 HELD>
__device__ __forceinline__ void reduce_scatter_pushed(const Call &call, const Fetch &record, Pieces<T> theirs) {
    typedef Batch<T, HELD> Held;
    Held first = {};
    if (call.gives()) first.load(theirs, first_piece());
    record.share();
    const Count count(call);
    const Rank *rank = call.rank();
    announce<false>(call);
#pragma unroll 1
    for (u32 hop = 1; call.gives() && hop < rank->ranks; ++hop) {
        const u32 peer = call.after(hop);
        if (hop != 1) theirs = columns_of<T>(call, peer);
#pragma unroll 1
        for (u32 index = first_piece(); index < theirs.count(); index += Held::step()) {
            Held pieces = first;
            if (hop != 1 || index != first_piece()) pieces.load(theirs, index);
            pieces.push(pushed(call, rank->out[peer]), index, theirs.count(), (u32)call.sequence());
        }
    }
    const Pieces<T> own = columns_of<T>(call, call.me().index);
    bool alive = greet(call, true, 0);
    Company company(call);
    const Pieces<T> target(call.output(call.width(rank->rank)));
#pragma unroll 1
    for (u32 index = first_piece(); alive && call.gets() && index - lane() < target.count(); index += Held::step()) {
        Sums<T, HELD> sums;
        Held mine = {};
        // On its way while the others' is waited for.
        if (call.gives()) mine.load(own, index);
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            Held part = mine;
            if (peer != rank->rank) {
                uint4 come[HELD];
                alive = company.receive_from(peer, index, target.count(), come);
                if (!alive) break;
                part.take(come);
            }
            if (company.gives(peer)) sums.add(part);
        }
        if (!alive) break;
        Held result;
        sums.round(result);
        result.store(target, index);
    }
    if (alive) greet(call, false, company.known);
    count.end(call);
}

template <class T> __device__ __forceinline__ void reduce_scatter_small(const Call &call) {
    const Pieces<T> theirs = columns_of<T>(call, call.after(1));
    wait_for_kernel_before();
    if (!call.gives() && !call.gets()) return only_come(call);
    const Fetch record(call);
    if (AT_ONCE<T> == 1 || most_pieces<T>(call) <= next_piece()) return reduce_scatter_pushed<T, 1>(call, record, theirs);
    reduce_scatter_pushed<T, AT_ONCE<T>>(call, record, theirs);
}

// Broadcast, gather to a rank, all_gather: who gives pushes its columns, in bytes, to all who may get them.
template <u32 HELD>
__device__ __forceinline__ void move_pushed(const Call &call, const Fetch &record, const Pieces<Byte> &own) {
    typedef Batch<Byte, HELD> Held;
    const u32 me = call.me().index;
    Held first = {};
    if (call.gives()) first.load(own, first_piece());
    record.share();
    const Count count(call);
    const Rank *rank = call.rank();
    announce<false>(call);
    const auto place_of = [&](u32 peer) {
        return Pieces<Byte>(View{call.me().output + call.begin[peer], call.rows, call.width(peer), call.me().output_stride});
    };
    const Pieces<Byte> here = place_of(me);
    const bool stays = call.gets() && here.data != own.data;
#pragma unroll 1
    for (u32 index = first_piece(); call.gives() && index < own.count(); index += Held::step()) {
        Held pieces = first;
        if (index != first_piece()) pieces.load(own, index);
#pragma unroll 1
        for (u32 hop = 1; hop < rank->ranks; ++hop) {
            const u32 peer = call.after(hop);
            if ((call.targets >> peer & 1) == 0) continue;
            pieces.push(pushed(call, rank->out[peer]), index, own.count(), (u32)call.sequence());
        }
        if (stays) pieces.store(here, index);
    }
    bool alive = greet(call, true, 0);
    Company company(call);
#pragma unroll 1
    for (u32 hop = 1; alive && call.gets() && hop < rank->ranks; ++hop) {
        const u32 peer = call.after(hop);
        const Pieces<Byte> place = place_of(peer);
#pragma unroll 1
        for (u32 index = first_piece(); alive && index - lane() < place.count(); index += Held::step()) {
            uint4 come[HELD];
            alive = company.receive_from(peer, index, place.count(), come);
            if (!alive || !company.gives(peer)) break;
            Held pieces;
            pieces.take(come);
            pieces.store(place, index);
        }
    }
    if (alive) greet(call, false, company.known);
    count.end(call);
}

__device__ __forceinline__ void move_small(const Call &call) {
    const u32 me = call.me().index;
    const Pieces<Byte> own(View{call.me().input + call.skip[me], call.rows, call.width(me), call.me().input_stride});
    wait_for_kernel_before();
    if (!call.gives() && !call.gets()) return only_come(call);
    const Fetch record(call);
    if (most_pieces<Byte>(call) <= next_piece()) return move_pushed<1>(call, record, own);
    move_pushed<MOVED_AT_ONCE>(call, record, own);
}
