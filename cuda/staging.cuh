// Staging memory, which all ranks see, and the chunks of tensors that go through it.
#pragma once

#include "copy.cuh"

// Bytes of the least chunk: 16 a thread.
constexpr u32 LEAST_CHUNK = 16 * THREADS;

// A tensor, or columns of it, as one line of bytes.
struct Line {
    u64 data;
    u64 stride;  // bytes from row to row
    u64 width;   // bytes of a row
    u64 bytes;   // in all
};

__device__ __forceinline__ Line line_of(const View &view, u64 skip, u64 width, u32 size) {
    Line line;
    line.data = view.data + skip * size;
    line.stride = view.rows > 1 ? view.stride * size : width * size;
    line.width = width * size;
    line.bytes = view.rows * line.width;
    return line;
}

__device__ __forceinline__ u64 at_line(const Line &line, u64 offset) {
    return line.data + (line.width == line.stride ? offset : scattered(offset, line.width, line.stride));
}

// Copies [from, to) of a line to linear memory or back, by one block. Loads of several steps are under way at once:
// each takes microseconds from host memory.
template <u32 BYTES, bool BACK>
__device__ __forceinline__ void copy_line_by(const Line &line, u64 from, u64 to, u8 *memory) {
    typedef typename Bytes<BYTES>::Type V;
    constexpr u32 AT_ONCE = BYTES == 16 ? 4 : 1;
    const u64 step = (u64)blockDim.x * BYTES;
#pragma unroll 1
    for (u64 at = from + (u64)threadIdx.x * BYTES; at < to; at += AT_ONCE * step) {
        V values[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            const u64 place = at + i * step;
            if (place < to) values[i] = load_once((const V *)(BACK ? (u64)(memory + (place - from)) : at_line(line, place)));
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            const u64 place = at + i * step;
            if (place < to) *(V *)(BACK ? at_line(line, place) : (u64)(memory + (place - from))) = values[i];
        }
    }
}

template <bool BACK> __device__ __noinline__ void copy_line(const Line &line, u64 from, u64 to, u8 *memory) {
    const u64 bits = line.data | line.width | line.stride | line.bytes;
    if ((bits & 15) == 0) {
        copy_line_by<16, BACK>(line, from, to, memory);
    } else {
        copy_line_by<1, BACK>(line, from, to, memory);
    }
}

template <u32 BYTES> __device__ __forceinline__ void copy_between_by(const Line &source, const Line &target, u64 from, u64 to) {
    typedef typename Bytes<BYTES>::Type V;
#pragma unroll 1
    for (u64 at = from + (u64)threadIdx.x * BYTES; at < to; at += (u64)blockDim.x * BYTES) {
        *(V *)at_line(target, at) = load_once((const V *)at_line(source, at));
    }
}

// Copies [from, to) of a line to another of the same shape, by one block.
__device__ __noinline__ void copy_between(const Line &source, const Line &target, u64 from, u64 to) {
    const u64 bits = source.data | source.stride | target.data | target.stride | target.width | target.bytes;
    if ((bits & 15) == 0) {
        copy_between_by<16>(source, target, from, to);
    } else {
        copy_between_by<1>(source, target, from, to);
    }
}

// The chunks of one block, and its place in everybody's staging memory.
struct Staging {
    const Call &call;
    const Meeting &meeting;
    const Rank *rank;
    u32 blocks;  // that stage; the others have nothing to do
    u32 chunk;   // bytes

    // `bytes` are those of the whole: about as many chunks a block as it has slots, so that copies in and out overlap.
    __device__ Staging(const Call &call, const Meeting &meeting, u64 bytes)
        : call(call), meeting(meeting), rank(call.rank()), blocks(min(gridDim.x, (u32)call.rank()->staging_blocks)) {
        const u64 fair = (bytes / (rank->slots * blocks) + LEAST_CHUNK - 1) / LEAST_CHUNK * LEAST_CHUNK;
        chunk = fair < LEAST_CHUNK ? LEAST_CHUNK : fair > rank->slot_bytes ? rank->slot_bytes : (u32)fair;
    }

    // Whether this rank uses the peer's tensors where they are.
    __device__ bool direct(u32 peer) const {
        return peer == rank->rank || ((rank->reaches >> peer & 1) != 0 && (meeting.peers[peer].role & PLAIN) != 0);
    }

    // Whether the peer uses this rank's tensors where they are.
    __device__ bool seen_by(u32 peer) const {
        return peer == rank->rank || ((rank->reached >> peer & 1) != 0 && (call.role() & PLAIN) != 0);
    }

    __device__ bool takes_from(u32 peer) const { return meeting.gives(peer) && !direct(peer); }
    __device__ bool puts_for(u32 peer) const { return meeting.gets(peer) && !seen_by(peer); }

    // First byte of this block's chunk `index` of a line.
    __device__ u64 first(u32 index) const { return (u64)(index * blocks + blockIdx.x) * chunk; }
    // The byte behind its last one.
    __device__ u64 last(u32 index, u64 bytes) const { return min(first(index) + chunk, bytes); }

    // How many chunks of a line are this block's.
    __device__ __noinline__ u32 chunks(u64 bytes) const {
        if (blockIdx.x >= blocks) return 0;
        const u32 all = (u32)((bytes + chunk - 1) / chunk);
        return all <= blockIdx.x ? 0 : (all - blockIdx.x + blocks - 1) / blocks;
    }

    __device__ u8 *slot(u32 owner, u32 index) const {
        return rank->stage[owner] + ((u64)blockIdx.x * rank->slots + index % rank->slots) * rank->slot_bytes;
    }

    // A peer's tensor, of the same shape as this rank's line.
    __device__ Line tensor(const Line &own, u32 peer, u32 size) const {
        Line line = own;
        if (peer != rank->rank) {
            line.data = meeting.peers[peer].data;
            if (call.rows > 1) line.stride = meeting.peers[peer].stride * size;
        }
        return line;
    }

    __device__ u64 mark(u32 index) const { return call.sequence() << 24 | (index + 1); }

    // Which of this block's turns in a round is the rank's: blocks begin with different ranks, so that all links are busy.
    __device__ u32 turn(u32 peer) const { return (peer + blockIdx.x) % rank->ranks; }

    // Whose a turn is.
    __device__ u32 whose(u32 turn) const { return (turn + rank->ranks - blockIdx.x % rank->ranks) % rank->ranks; }

    // Of a giver's chunks in the order in which it puts them, the place of chunk `round` of the columns of `target`. It
    // is counted as if the giver put for all others: who takes does not know whom the giver reaches. The odd number of
    // places in a round lets chunks for one target use all slots where there are four.
    __device__ u32 place(u32 giver, u32 target, u32 round) const {
        const u32 at = turn(target) - (turn(target) > turn(giver) ? 1 : 0);
        return round * ((rank->ranks - 1) | 1) + at;
    }

    // Waits until this rank's slot for chunk `index` is free. Called by all threads of the block.
    __device__ __noinline__ bool free_slot(u32 index) const {
        bool alive = true;
        const u32 peer = threadIdx.x;
        if (index >= rank->slots && peer < rank->ranks && puts_for(peer)) {
            alive = wait_for(call, &rank->in[peer]->consumed[blockIdx.x].value, mark(index - rank->slots), peer);
        }
        return !__syncthreads_or(!alive);
    }

    // Puts chunk `index` of this rank's line where the others see it.
    __device__ __noinline__ bool put(const Line &line, u32 index) const {
        if (!free_slot(index)) return false;
        copy_line<false>(line, first(index), last(index, line.bytes), slot(rank->rank, index));
        __syncthreads();
        const u32 peer = threadIdx.x;
        if (peer < rank->ranks && puts_for(peer)) store_release(&rank->out[peer]->staged[blockIdx.x].value, mark(index));
        return true;
    }

    // Waits for chunk `index` of the ranks that this one takes from; of those only for whom `has` it is so.
    template <class Has> __device__ __forceinline__ bool await_of(u32 index, Has has) const {
        bool alive = true;
        const u32 peer = threadIdx.x;
        if (peer < rank->ranks && takes_from(peer) && has(peer)) {
            alive = wait_for(call, &rank->in[peer]->staged[blockIdx.x].value, mark(index), peer);
        }
        return !__syncthreads_or(!alive);
    }
    __device__ __noinline__ bool await(u32 index) const {
        return await_of(index, [](u32) { return true; });
    }

    // Who sums chunk `index` for all: the `givers` in turn. A rank that only gets would not hear when its slots are free.
    __device__ __noinline__ u32 owner(u32 givers, u32 index) const {
        u32 turn = (index + blockIdx.x) % givers, peer = 0;
#pragma unroll 1
        for (;; ++peer) {
            if (meeting.gives(peer) && turn-- == 0) return peer;
        }
    }

    // Tells those to whose tensors this rank cannot write that the sum of chunk `index` is there.
    __device__ __noinline__ void tell_summed(u32 index) const {
        __syncthreads();
        const u32 peer = threadIdx.x;
        if (peer < rank->ranks && meeting.gets(peer) && !direct(peer)) {
            store_release(&rank->out[peer]->summed[blockIdx.x].value, mark(index));
        }
    }

    // Waits for the sum of chunk `index`.
    __device__ __noinline__ bool await_sum(u32 owner, u32 index) const {
        bool alive = true;
        if (threadIdx.x == 0) alive = wait_for(call, &rank->in[owner]->summed[blockIdx.x].value, mark(index), owner);
        return !__syncthreads_or(!alive);
    }

    // Tells everyone whom this rank takes from that it is done with chunk `index`. What was read of it has been used
    // before the barrier, so no fence has to wait for it: fences take longer than the copies of small chunks.
    __device__ __noinline__ void release(u32 index) const {
        __syncthreads();
        const u32 peer = threadIdx.x;
        if (peer < rank->ranks && takes_from(peer)) {
            store_relaxed(&rank->out[peer]->consumed[blockIdx.x].value, mark(index));
        }
    }
};

// Every chunk of every rank goes past `work(index)`, which sees those of the givers in their slots. The next chunk is
// put before the last one is waited for. `bytes(peer)` is the length of a peer's line.
template <class Length, class Work>
__device__ __forceinline__ bool each_chunk(const Staging &staging, const Line &own, Length bytes, Work work) {
    const Call &call = staging.call;
    u32 mine = 0, theirs = 0;
#pragma unroll 1
    for (u32 peer = 0; peer < staging.rank->ranks; ++peer) {
        if (call.gives() && staging.puts_for(peer)) mine = staging.chunks(own.bytes);
        if (call.gets() && staging.takes_from(peer)) theirs = max(theirs, staging.chunks(bytes(peer)));
    }
#pragma unroll 1
    for (u32 step = 0; step < mine || step <= theirs; ++step) {
        if (step < mine && !staging.put(own, step)) return false;
        if (step == 0 || step > theirs) continue;
        const u32 index = step - 1;
        const bool all = staging.await_of(index, [&](u32 peer) { return index < staging.chunks(bytes(peer)); });
        if (!all) return false;
        work(index);
        staging.release(index);
    }
    return true;
}
