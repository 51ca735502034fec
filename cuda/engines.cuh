// Large operations of two ranks out of each other's reach, whose data the copy engines carry: the kernels here only say
// what may go, and work on what has come. src/comm/cuda/engines.rs has the order of kernels and copies.
//
// A rank's chunks go in turn by several lanes. A lane is two streams: on the outgoing one a chunk is copied to a slot in
// host memory and the peer told, on the incoming one the peer's is awaited, copied to scratch memory and worked on. All
// copies are made, whatever the ranks bring, since the host knows its own rank only: so none of them writes a tensor,
// which only kernels do, and they know the peer's letter.
#pragma once

#include "reduce.cuh"
#include "staging.cuh"

// The second parameter: what a kernel between two copies of a lane does.
struct Step {
    u64 scratch;  // where the chunk that came lies, or the next to go is to be packed
    u64 from;     // its first byte of the tensor as one line
    u64 to;       // and the one behind it; the same for nothing
    u32 lane;
    u32 copied;   // the chunk whose copy has just ended, and 1; 0 for none
    u32 awaited;  // the chunk to wait for, and 1; 0 for none
    u32 size;     // of an element where columns are counted in elements, 0 where in bytes
};

// One step as a block sees it. There are two ranks.
struct Engine {
    const Call &call;
    const Step &step;
    const Rank *rank;
    u32 peer;
    u32 role;  // of the peer
    bool leads;

    __device__ Engine(const Call &call, const Step &step)
        : call(call), step(step), rank(call.rank()), peer(1 - call.rank()->rank), role(role_of(call)),
          leads(blockIdx.x == 0 && threadIdx.x == 0) {}

    // From the letter that `engines_meet` has passed on.
    static __device__ u32 role_of(const Call &call) {
        const Rank *rank = call.rank();
        const uint4 *letter = (const uint4 *)&rank->seen[1 - rank->rank][(u32)call.sequence() & 1];
        return load_volatile(letter).z;
    }

    __device__ u64 mark(u32 chunk) const { return call.sequence() << 24 | chunk; }

    // This block's part of the chunk: whole accesses of all its threads.
    __device__ u64 part(u32 index) const {
        const u64 across = (u64)blockDim.x * WIDE;
        const u64 each = ((step.to - step.from + across - 1) / across + gridDim.x - 1) / gridDim.x * across;
        return min(step.from + index * each, step.to);
    }
};

// Packs the next chunk of a tensor with gaps between its rows; tells the peer of the one that was copied; waits until
// the slot of another is free.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
engines_send(const __grid_constant__ Call call, const __grid_constant__ Step step) {
    begin(call);
    if (call.rank()->broken != 0) return;
    const Engine engine(call, step);
    if ((engine.role & GETS) == 0) return;
    const Rank *rank = engine.rank;
    if (engine.leads && step.copied != 0) {
        store_release(&rank->out[engine.peer]->staged[step.lane].value, engine.mark(step.copied));
    }
    if (step.from < step.to) {
        // Of a sum every rank has all columns.
        const u64 width = step.size == 0 ? call.width(rank->rank) : call.columns;
        const Line own = line_of(call.input(width), step.size == 0 ? call.skip[rank->rank] : 0, width, max(step.size, 1u));
        const u64 from = engine.part(blockIdx.x), to = engine.part(blockIdx.x + 1);
        copy_line<false>(own, from, to, (u8 *)step.scratch + (from - step.from));
    }
    if (engine.leads && step.awaited != 0) {
        wait_for(call, &rank->in[engine.peer]->consumed[step.lane].value, engine.mark(step.awaited), engine.peer);
    }
}

// Lets the peer use the slot of the chunk that was copied, works on that chunk, and waits for the lane's next one. Where
// this rank's own is overwritten, also until that has left.
template <class Work> __device__ __forceinline__ void engines_receive(const Call &call, const Step &step, bool in_place, Work work) {
    begin(call);
    if (call.rank()->broken != 0) return;
    const Engine engine(call, step);
    const Rank *rank = engine.rank;
    const bool given = (engine.role & GIVES) != 0;
    if (engine.leads && given && step.copied != 0) {
        store_release(&rank->out[engine.peer]->consumed[step.lane].value, engine.mark(step.copied));
    }
    if (step.from < step.to) work(engine, engine.part(blockIdx.x), engine.part(blockIdx.x + 1));
    if (!engine.leads || step.awaited == 0) return;
    if (given) wait_for(call, &rank->in[engine.peer]->staged[step.lane].value, engine.mark(step.awaited), engine.peer);
    if (in_place && call.gives() && (engine.role & GETS) != 0) {
        wait_for(call, &rank->out[engine.peer]->staged[step.lane].value, engine.mark(step.awaited), engine.peer);
    }
}

// The sum of [from, to) of the line, by one block: of this rank's elements and those that came, in the order of ranks.
template <class T, u32 BYTES>
__device__ __noinline__ void add_chunk(const Engine &engine, const Line &own, u64 from, u64 to) {
    typedef typename T::Bits Bits;
    typedef typename Bytes<BYTES>::Type Vector;
    constexpr u32 AT_ONCE = BYTES == WIDE && sizeof(Bits) > 1 ? 2 : 1;
    const u64 step = (u64)blockDim.x * BYTES;
    const u64 scratch = engine.step.scratch - engine.step.from;
    union {
        Vector vector;
        Bits elements[BYTES / sizeof(Bits)];
    } pieces[AT_ONCE];
#pragma unroll 1
    for (u64 at = from + (u64)threadIdx.x * BYTES; at < to; at += AT_ONCE * step) {
        Pack<T, BYTES> sums[AT_ONCE];
        bool first = true;
#pragma unroll 1
        for (u32 rank = 0; rank < 2; ++rank) {
            const bool mine = rank == engine.rank->rank;
            if (((mine ? engine.call.role() : engine.role) & GIVES) == 0) continue;
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; ++i) {
                const u64 place = at + i * step;
                if (place < to) pieces[i].vector = load_once((const Vector *)(mine ? at_line(own, place) : scratch + place));
            }
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; ++i) sums[i].add(pieces[i].elements, first);
            first = false;
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            const u64 place = at + i * step;
            sums[i].round(pieces[i].elements);
            if (place < to) *(Vector *)at_line(own, place) = pieces[i].vector;
        }
    }
}

template <class T> __device__ __forceinline__ void engines_sum(const Call &call, const Step &step) {
    constexpr u32 size = sizeof(typename T::Bits);
    engines_receive(call, step, true, [&](const Engine &engine, u64 from, u64 to) {
        // Without anything to add, the tensor stays what it was.
        if (((call.role() | engine.role) & GIVES) == 0) return;
        const Line own = line_of(call.output(call.columns), 0, call.columns, size);
        if (((own.data | own.stride | own.width) & (WIDE - 1)) == 0) {
            add_chunk<T, WIDE>(engine, own, from, to);
        } else {
            add_chunk<T, size>(engine, own, from, to);
        }
    });
}

// Tells the peer what this rank brings, and waits for its letter.
extern "C" __global__ void __launch_bounds__(THREADS, 1) engines_meet(const __grid_constant__ Call call) {
    begin(call);
    announce<false>(call);
    if (threadIdx.x != 0 || call.rank()->broken != 0) return;
    uint4 letter[3] = {};
    read_letter(call, 1 - call.rank()->rank, letter, false);
}

// What the rank gives itself.
extern "C" __global__ void __launch_bounds__(THREADS, 1) engines_own(const __grid_constant__ Call call) {
    begin(call);
    const u32 me = call.rank()->rank;
    if (call.rank()->broken != 0) return;
    Rows rows;
    rows.to = call.me().output + call.begin[me];
    rows.to_stride = call.me().output_stride;
    rows.from = call.me().input + call.skip[me];
    rows.from_stride = call.me().input_stride;
    rows.rows = call.rows;
    rows.width = call.width(me);
    if (rows.to != rows.from) copy_rows(rows);
}

// Moves what has come to its columns of the output.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
engines_take(const __grid_constant__ Call call, const __grid_constant__ Step step) {
    engines_receive(call, step, false, [&](const Engine &engine, u64 from, u64 to) {
        if ((engine.role & GIVES) == 0) return;
        const u32 peer = engine.peer;
        const Line line = line_of(call.output(call.columns), call.begin[peer], call.width(peer), 1);
        copy_line<true>(line, from, to, (u8 *)step.scratch + (from - step.from));
    });
}

// Ends the operation, once the peer needs nothing of this rank any more.
extern "C" __global__ void __launch_bounds__(THREADS, 1) engines_leave(const __grid_constant__ Call call) {
    Meeting &meeting = shared_by_block<Shared>().meeting;
    begin(call);
    const Rank *rank = call.rank();
    const bool came = rank->broken == 0;
    if (came && threadIdx.x < 2) {
        meeting.peers[threadIdx.x].role = threadIdx.x == rank->rank ? call.role() : Engine::role_of(call);
    }
    leave(call, came ? &meeting : nullptr);
}
