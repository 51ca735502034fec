// The operations where some rank is out of another's reach: chunk by chunk through each rank's staging memory, which
// all see. A block puts its chunk into a slot, waits for the same chunk of its peers, works, and says that it is done
// with it. Several slots a block let it run ahead, so that both directions of a link are busy. Only pairs of ranks
// that do not reach each other go this way; the others read and write each other's tensors meanwhile.
#pragma once

#include "reduce.cuh"
#include "staging.cuh"

// How a large sum is shared.
struct Sharing {
    u32 givers;   // ranks
    u32 other;    // than this one, where there are two
    u32 chunks;   // of this block
    bool both;    // two ranks that do not reach each other
    bool kept;    // sums of this rank in its slots, for those who cannot read its tensor
    bool told;    // to ranks to whose tensors this one cannot write
    bool wide;    // all tensors aligned
    bool scattered = false;  // every rank gets columns of its own
    u64 skip = 0;            // bytes before them in the rows that are given

    __device__ __noinline__ Sharing(const Staging &staging, const Line &own, u32 size)
        : givers(0), other(staging.rank->rank), kept(false), told(false) {
        u64 bits = own.data | own.stride | own.width;
        u32 present = 0;
#pragma unroll 1
        for (u32 peer = 0; peer < staging.rank->ranks; ++peer) {
            if (!staging.meeting.present(peer)) continue;
            ++present;
            if (staging.meeting.gives(peer)) ++givers;
            if (peer != staging.rank->rank) other = peer;
            kept |= staging.puts_for(peer);
            told |= staging.meeting.gets(peer) && !staging.direct(peer);
            if (!staging.direct(peer)) continue;
            const Line line = staging.tensor(own, peer, size);
            bits |= line.data | line.stride;
        }
        both = present == 2 && !staging.direct(other) && !staging.seen_by(other);
        kept &= !both;
        told &= !both;
        wide = (bits & (WIDE - 1)) == 0;
        chunks = staging.chunks(own.bytes);
    }

    // Of a sum whose columns are scattered, for a rank that gets some: only this rank sums them, to `target`.
    __device__ __noinline__ Sharing(const Staging &staging, const Line &own, const Line &target, u64 skip, u32 size)
        : givers(0), other(staging.rank->rank), chunks(staging.chunks(target.bytes)), both(true), kept(false), told(false),
          scattered(true), skip(skip) {
        u64 bits = target.data | target.stride | target.width;
#pragma unroll 1
        for (u32 peer = 0; peer < staging.rank->ranks; ++peer) {
            if (!staging.meeting.gives(peer) || !staging.direct(peer)) continue;
            const Line line = source(staging, own, peer, 0, size);
            bits |= line.data | line.stride;
        }
        wide = (bits & (WIDE - 1)) == 0;
    }

    // Where what a rank gives to chunk `index` lies, as if all of the line lay there.
    __device__ __forceinline__ Line source(const Staging &staging, const Line &own, u32 peer, u32 index, u32 size) const {
        if (staging.direct(peer)) {
            Line line = staging.tensor(own, peer, size);
            if (peer != staging.rank->rank) line.data += skip;
            return line;
        }
        const u32 place = scattered ? staging.place(peer, staging.rank->rank, index) : index;
        return Line{(u64)staging.slot(peer, place) - staging.first(index), own.width, own.width, own.bytes};
    }

    // Steps from putting a chunk to having its sum.
    __device__ u32 lag() const { return both ? 1 : 2; }
};

// The sum of [from, to) of chunk `index`, counted from its beginning, by one block: from the slots of ranks out of reach
// and the tensors of the others, to this rank's `target`. Where this rank sums for all, also to the tensors in reach, and
// to its slot for the others.
template <class T, u32 BYTES>
__device__ __noinline__ void sum_chunk(const Staging &staging, const Line &own, const Line &target, u32 index, u64 from,
                                       u64 to, const Sharing &sharing) {
    typedef typename T::Bits Bits;
    typedef typename Bytes<BYTES>::Type Vector;
    // Sums of bytes widen to so much that there is room for no more.
    constexpr u32 AT_ONCE = BYTES == WIDE && sizeof(Bits) > 1 ? 2 : 1;
    const u64 step = (u64)blockDim.x * BYTES;
    const u64 base = staging.first(index);
    const u32 ranks = staging.rank->ranks, me = staging.rank->rank;
    union {
        Vector vector;
        Bits elements[BYTES / sizeof(Bits)];
    } pieces[AT_ONCE];
#pragma unroll 1
    for (u64 at = from + (u64)threadIdx.x * BYTES; at < to; at += AT_ONCE * step) {
        Pack<T, BYTES> sums[AT_ONCE];
        bool first = true;
#pragma unroll 1
        for (u32 peer = 0; peer < ranks; ++peer) {
            if (!staging.meeting.gives(peer)) continue;
            const Line line = sharing.source(staging, own, peer, index, sizeof(Bits));
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; ++i) {
                if (at + i * step < to) pieces[i].vector = load_once((const Vector *)at_line(line, base + at + i * step));
            }
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; ++i) sums[i].add(pieces[i].elements, first);
            first = false;
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) sums[i].round(pieces[i].elements);
#pragma unroll 1
        for (u32 peer = 0; peer < ranks; ++peer) {
            if (peer != me && (sharing.both || !staging.meeting.gets(peer) || !staging.direct(peer))) continue;
            const Line line = peer == me ? target : staging.tensor(own, peer, sizeof(Bits));
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; ++i) {
                if (at + i * step < to) *(Vector *)at_line(line, base + at + i * step) = pieces[i].vector;
            }
        }
        if (!sharing.kept) continue;
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            if (at + i * step < to) *(Vector *)(staging.slot(me, index) + at + i * step) = pieces[i].vector;
        }
    }
}

// Puts chunk `index` where the rank that sums it needs it there.
__device__ __noinline__ bool contribute(const Staging &staging, const Line &own, const Sharing &sharing, u32 index) {
    const u32 owner = sharing.both ? sharing.other : staging.owner(sharing.givers, index);
    return !staging.call.gives() || staging.seen_by(owner) || staging.put(own, index);
}

// Takes the sum of chunk `index` where its owner could not write it to this rank's tensor, and lets go of the chunk.
__device__ __noinline__ bool finish(const Staging &staging, const Line &own, const Sharing &sharing, u32 index, u32 size) {
    const u32 owner = sharing.both ? staging.rank->rank : staging.owner(sharing.givers, index);
    if (!staging.seen_by(owner)) {
        if (!staging.await_sum(owner, index)) return false;
        const u64 from = staging.first(index), to = staging.last(index, own.bytes);
        if (!sharing.both && staging.direct(owner)) {
            copy_between(staging.tensor(own, owner, size), own, from, to);
        } else {
            copy_line<true>(own, from, to, staging.slot(owner, index));
        }
    }
    staging.release(index);
    return true;
}

// Sums chunk `index` if this rank does, once the parts of the others are there.
template <class T>
__device__ __noinline__ bool sum_of(const Staging &staging, const Line &own, const Sharing &sharing, u32 index) {
    if (!sharing.both && staging.owner(sharing.givers, index) != staging.rank->rank) return true;
    if (!staging.await(index)) return false;
    if (sharing.kept && !staging.free_slot(index)) return false;
    const u64 length = staging.last(index, own.bytes) - staging.first(index);
    const u64 whole = sharing.wide ? length / WIDE * WIDE : 0;
    sum_chunk<T, WIDE>(staging, own, own, index, 0, whole, sharing);
    sum_chunk<T, sizeof(typename T::Bits)>(staging, own, own, index, whole, length, sharing);
    if (sharing.told) staging.tell_summed(index);
    return true;
}

// A large sum. Two ranks that do not reach each other exchange their chunks, and both sum them. Else the ranks sum
// one chunk each in turn for all, which is less to move: a rank puts what others sum, and takes the result from there.
template <class T> __device__ __noinline__ bool all_reduce_staged(const Call &call, const Meeting &meeting) {
    constexpr u32 size = sizeof(typename T::Bits);
    const Line own = line_of(call.output(call.columns), 0, call.columns, size);
    const Staging staging(call, meeting, own.bytes);
    const Sharing sharing(staging, own, size);
    if (sharing.givers == 0) return true;
#pragma unroll 1
    for (u32 step = 0; step < sharing.chunks + sharing.lag(); ++step) {
        if (step < sharing.chunks && !contribute(staging, own, sharing, step)) return false;
        if (step >= 1 && step <= sharing.chunks && !sum_of<T>(staging, own, sharing, step - 1)) return false;
        if (step >= sharing.lag() && !finish(staging, own, sharing, step - sharing.lag(), size)) return false;
    }
    return true;
}

// Chunks of a sum whose columns are scattered. They go round by round: one chunk of every rank's columns, which all
// others put for it in the same turn. No turn waits for a later one, so that no ring of waits can close.
struct Rounds {
    const Staging &staging;
    u64 bytes;  // of one column, in all rows

    __device__ u32 chunks(u32 target) const { return staging.chunks(staging.call.width(target) * bytes); }

    // Waits until the slot for what this rank puts at `place` is free: everyone has taken what was put at least as many
    // places before as there are slots.
    __device__ __noinline__ bool free_place(u32 place) const {
        const Rank *rank = staging.rank;
        const u32 peer = threadIdx.x;
        bool alive = true;
        if (place >= rank->slots && peer < rank->ranks && peer != rank->rank && staging.puts_for(peer)) {
            const u32 before = place - rank->slots, first = staging.place(rank->rank, peer, 0);
            const u32 count = chunks(peer);
            if (count > 0 && before >= first) {
                const u32 round = min((before - first) / ((rank->ranks - 1) | 1), count - 1);
                const u64 mark = staging.mark(staging.place(rank->rank, peer, round));
                alive = wait_for(staging.call, &rank->in[peer]->consumed[blockIdx.x].value, mark, peer);
            }
        }
        return !__syncthreads_or(!alive);
    }

    // Puts a chunk of the columns of `target` where it sees it.
    __device__ __noinline__ bool put(u32 target, u32 round, u32 size) const {
        const Call &call = staging.call;
        const Rank *rank = staging.rank;
        if (target == rank->rank || !call.gives() || !staging.puts_for(target) || round >= chunks(target)) return true;
        const u32 place = staging.place(rank->rank, target, round);
        if (!free_place(place)) return false;
        const Line line = line_of(call.input(call.width(target)), call.begin[target], call.width(target), size);
        copy_line<false>(line, staging.first(round), staging.last(round, line.bytes), staging.slot(rank->rank, place));
        __syncthreads();
        if (threadIdx.x == 0) store_release(&rank->out[target]->staged[blockIdx.x].value, staging.mark(place));
        return true;
    }

    // Waits for what the others put of chunk `round` of this rank's columns.
    __device__ __noinline__ bool await(u32 round) const {
        const Rank *rank = staging.rank;
        const u32 peer = threadIdx.x;
        bool alive = true;
        if (peer < rank->ranks && staging.takes_from(peer)) {
            const u64 mark = staging.mark(staging.place(peer, rank->rank, round));
            alive = wait_for(staging.call, &rank->in[peer]->staged[blockIdx.x].value, mark, peer);
        }
        return !__syncthreads_or(!alive);
    }

    // Lets go of it.
    __device__ __noinline__ void release(u32 round) const {
        const Rank *rank = staging.rank;
        const u32 peer = threadIdx.x;
        __syncthreads();
        if (peer < rank->ranks && staging.takes_from(peer)) {
            const u64 mark = staging.mark(staging.place(peer, rank->rank, round));
            store_relaxed(&rank->out[peer]->consumed[blockIdx.x].value, mark);
        }
    }
};

// Every rank puts for each rank out of reach that rank's columns only, and sums its own.
template <class T> __device__ __noinline__ bool reduce_scatter_staged(const Call &call, const Meeting &meeting) {
    constexpr u32 size = sizeof(typename T::Bits);
    const Rank *rank = call.rank();
    const u32 me = rank->rank;
    u32 widest = 0;
#pragma unroll 1
    for (u32 peer = 0; peer < rank->ranks; ++peer) widest = max(widest, call.width(peer));
    const Staging staging(call, meeting, call.rows * widest * size);
    const Rounds rounds{staging, call.rows * size};
    const Line own = line_of(call.input(call.width(me)), call.begin[me], call.width(me), size);
    const Line target = line_of(call.output(call.width(me)), 0, call.width(me), size);
    const Sharing sharing(staging, own, target, (u64)call.begin[me] * size, size);
    const u32 mine = call.gets() ? rounds.chunks(me) : 0;
    const u32 turns = staging.chunks(call.rows * widest * size) * rank->ranks;
#pragma unroll 1
    for (u32 step = 0; step <= turns; ++step) {
        const u32 whose = staging.whose(step % rank->ranks);
        if (step < turns && !rounds.put(whose, step / rank->ranks, size)) return false;
        if (step == 0) continue;
        // What was put for the last turn.
        const u32 round = (step - 1) / rank->ranks;
        if (staging.whose((step - 1) % rank->ranks) != me || round >= mine) continue;
        if (!rounds.await(round)) return false;
        const u64 length = staging.last(round, target.bytes) - staging.first(round);
        const u64 whole = sharing.wide ? length / WIDE * WIDE : 0;
        sum_chunk<T, WIDE>(staging, own, target, round, 0, whole, sharing);
        sum_chunk<T, size>(staging, own, target, round, whole, length, sharing);
        rounds.release(round);
    }
    return true;
}

// What `take_direct` leaves.
__device__ __noinline__ bool take_staged(const Call &call, const Meeting &meeting) {
    const Rank *rank = call.rank();
    const u32 me = rank->rank;
    const Line own = line_of(call.input(call.width(me)), call.skip[me], call.width(me), 1);
    const Staging staging(call, meeting, call.rows * call.columns);
    return each_chunk(staging, own, [&](u32 peer) { return call.rows * call.width(peer); }, [&](u32 index) {
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            const u64 bytes = call.rows * call.width(peer);
            if (!staging.takes_from(peer) || staging.first(index) >= bytes) continue;
            const Line line = line_of(call.output(call.columns), call.begin[peer], call.width(peer), 1);
            copy_line<true>(line, staging.first(index), staging.last(index, bytes), staging.slot(peer, index));
        }
    });
}
