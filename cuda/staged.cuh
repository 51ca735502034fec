// The same operations where some tensor is out of a peer's reach: chunk by chunk through each rank's staging
// memory, which all peers see. A block stages its chunk, waits for the same chunk of every peer, works, and says
// that it is done with it. Several slots a block let it run ahead.
#pragma once

#include "reduce.cuh"

// A tensor, or columns of it, as one line of bytes.
struct Line {
    u64 data;
    u64 stride;  // bytes from row to row
    u64 width;   // bytes of a row
    u64 bytes;   // in all
};

__device__ __forceinline__ u64 at_line(const Line &line, u64 offset) {
    if (line.width == line.stride) return line.data + offset;
    return line.data + offset / line.width * line.stride + offset % line.width;
}

// Copies [from, to) of a line to linear memory or back, by one block.
template <u32 BYTES, bool BACK> __device__ __forceinline__ void copy_line_by(const Line &line, u64 from, u64 to, u8 *memory) {
    typedef typename Bytes<BYTES>::Type V;
    for (u64 at = from + (u64)threadIdx.x * BYTES; at < to; at += (u64)blockDim.x * BYTES) {
        V *strided = (V *)at_line(line, at);
        V *linear = (V *)(memory + (at - from));
        if (BACK) {
            *strided = load_once(linear);
        } else {
            *linear = *strided;
        }
    }
}

template <bool BACK> __device__ __noinline__ void copy_line(const Line &line, u64 from, u64 to, u8 *memory) {
    const u64 bits = line.data | line.width | line.stride | line.bytes;
    if ((bits & 15) == 0) {
        copy_line_by<16, BACK>(line, from, to, memory);
    } else if ((bits & 3) == 0) {
        copy_line_by<4, BACK>(line, from, to, memory);
    } else {
        copy_line_by<1, BACK>(line, from, to, memory);
    }
}

// The chunks of one block, and its place in everybody's staging memory.
struct Staging {
    const Call &call;
    const Meeting &meeting;
    Rank *rank;

    __device__ Staging(const Call &call, const Meeting &meeting) : call(call), meeting(meeting), rank(call.rank()) {}

    // First byte of this block's chunk `index` of a line.
    __device__ u64 first(u64 index) const { return (index * gridDim.x + blockIdx.x) * rank->chunk_bytes; }

    // How many chunks of a line are this block's.
    __device__ u64 chunks(u64 bytes) const {
        const u64 all = (bytes + rank->chunk_bytes - 1) / rank->chunk_bytes;
        return all <= blockIdx.x ? 0 : (all - blockIdx.x + gridDim.x - 1) / gridDim.x;
    }

    __device__ u8 *slot(u32 owner, u64 index) const {
        return rank->stage[owner] + ((u64)blockIdx.x * rank->slots + index % rank->slots) * rank->chunk_bytes;
    }

    __device__ u64 mark(u64 index) const { return meeting.sequence << 24 | (index + 1); }

    // Puts chunk `index` of this rank's line where peers see it. Called by all threads of the block.
    __device__ __noinline__ bool put(const Line &line, u64 index) {
        bool alive = true;
        const u32 peer = threadIdx.x;
        const bool waits = peer < rank->ranks && peer != rank->rank && meeting.gets(peer);
        if (index >= rank->slots && waits) {
            alive = wait_for(call, &rank->in[peer]->consumed[blockIdx.x], mark(index - rank->slots), peer);
        }
        if (__syncthreads_or(!alive)) return false;
        const u64 from = first(index);
        const u64 to = from + rank->chunk_bytes < line.bytes ? from + rank->chunk_bytes : line.bytes;
        copy_line<false>(line, from, to, slot(rank->rank, index));
        __threadfence_system();
        __syncthreads();
        if (waits) store_release(&rank->out[peer]->staged[blockIdx.x], mark(index));
        return true;
    }

    // Waits for chunk `index` of every giver that has so many. `bytes` are the lengths of their lines.
    __device__ __noinline__ bool await(const u64 *bytes, u64 index) {
        bool alive = true;
        const u32 peer = threadIdx.x;
        if (peer < rank->ranks && peer != rank->rank && meeting.gives(peer) && index < chunks(bytes[peer])) {
            alive = wait_for(call, &rank->in[peer]->staged[blockIdx.x], mark(index), peer);
        }
        __threadfence_system();
        return !__syncthreads_or(!alive);
    }

    // Tells every giver that its chunk `index` is not needed any more.
    __device__ __noinline__ void release(u64 index) {
        __syncthreads();
        const u32 peer = threadIdx.x;
        if (peer < rank->ranks && peer != rank->rank && meeting.gives(peer)) {
            store_release(&rank->out[peer]->consumed[blockIdx.x], mark(index));
        }
    }
};

__device__ __forceinline__ Line line_of(const View &view, u64 skip, u64 width, u32 size) {
    Line line;
    line.data = view.data + skip * size;
    line.stride = view.rows > 1 ? view.stride * size : width * size;
    line.width = width * size;
    line.bytes = view.rows * line.width;
    return line;
}

// Every chunk of every rank goes past `work(index)`, which sees the chunks of all givers in their slots.
template <class Work>
__device__ __forceinline__ bool each_chunk(Staging &staging, const Line &own, const u64 *bytes, Work work) {
    const Call &call = staging.call;
    const bool gives = call.gives(), gets = call.gets();
    u64 most = gives ? staging.chunks(own.bytes) : 0;
    if (gets) {
#pragma unroll 1
        for (u32 peer = 0; peer < staging.rank->ranks; ++peer) {
            if (staging.meeting.gives(peer) && staging.chunks(bytes[peer]) > most) most = staging.chunks(bytes[peer]);
        }
    }
    for (u64 index = 0; index < most; ++index) {
        if (gives && index < staging.chunks(own.bytes) && !staging.put(own, index)) return false;
        if (!gets) continue;
        if (!staging.await(bytes, index)) return false;
        work(index);
        staging.release(index);
    }
    return true;
}

template <class T> __device__ __noinline__ bool all_reduce_staged(const Call &call, const Meeting &meeting, u64 *bytes) {
    typedef typename T::Bits Bits;
    constexpr u32 count = WIDE / sizeof(Bits);
    Staging staging(call, meeting);
    Rank *rank = call.rank();
    const Line own = line_of(call.output(call.columns), 0, call.columns, sizeof(Bits));
    if (threadIdx.x < rank->ranks) bytes[threadIdx.x] = own.bytes;
    __syncthreads();
    const bool wide = ((own.data | own.width | own.stride) & (WIDE - 1)) == 0;
    return each_chunk(staging, own, bytes, [&](u64 index) {
        const u64 from = staging.first(index);
        if (from >= own.bytes) return;
        const u64 length = from + rank->chunk_bytes < own.bytes ? rank->chunk_bytes : own.bytes - from;
        for (u64 at = (u64)threadIdx.x * WIDE; at < length; at += (u64)blockDim.x * WIDE) {
            Pack<T, WIDE> sum;
            Chunk<T> value;
            bool first = true;
#pragma unroll 1
            for (u32 peer = 0; peer < rank->ranks; ++peer) {
                if (!meeting.gives(peer)) continue;
                // The slots are whole multiples of 16 bytes, so what lies behind the tensor's end may be read.
                value.vector = load_once((const uint4 *)(staging.slot(peer, index) + at));
                sum.add(value.elements, first);
                first = false;
            }
            sum.round(value.elements);
            if (wide && at + WIDE <= length) {
                *(uint4 *)at_line(own, from + at) = value.vector;
            } else {
                for (u32 i = 0; i < count; ++i) {
                    const u64 offset = at + i * sizeof(Bits);
                    if (offset < length) *(Bits *)at_line(own, from + offset) = value.elements[i];
                }
            }
        }
    });
}

template <class T> __device__ __noinline__ bool reduce_scatter_staged(const Call &call, const Meeting &meeting, u64 *bytes) {
    typedef typename T::Bits Bits;
    Staging staging(call, meeting);
    Rank *rank = call.rank();
    const u64 columns = call.columns;
    const Line own = line_of(call.input(columns), 0, columns, sizeof(Bits));
    if (threadIdx.x < rank->ranks) bytes[threadIdx.x] = own.bytes;
    __syncthreads();
    const u64 begin = call.begin[rank->rank], end = call.end[rank->rank];
    return each_chunk(staging, own, bytes, [&](u64 index) {
        const u64 from = staging.first(index) / sizeof(Bits);
        const u64 to = min(from + rank->chunk_bytes / sizeof(Bits), call.rows * columns);
        for (u64 at = from + threadIdx.x; at < to; at += blockDim.x) {
            const u64 row = at / columns, column = at % columns;
            if (column < begin || column >= end) continue;
            Pack<T, sizeof(Bits)> sum;
            bool first = true;
#pragma unroll 1
            for (u32 peer = 0; peer < rank->ranks; ++peer) {
                if (!meeting.gives(peer)) continue;
                const Bits value = load_once((const Bits *)staging.slot(peer, index) + (at - from));
                sum.add(&value, first);
                first = false;
            }
            sum.round((Bits *)call.me().output + row * call.me().output_stride + (column - begin));
        }
    });
}

__device__ __noinline__ bool take_staged(const Call &call, const Meeting &meeting, u64 *bytes) {
    Staging staging(call, meeting);
    Rank *rank = call.rank();
    const u32 me = rank->rank;
    const Line own = line_of(call.input(call.width(me)), call.skip[me], call.width(me), 1);
    if (threadIdx.x < rank->ranks) bytes[threadIdx.x] = call.rows * call.width(threadIdx.x);
    __syncthreads();
    return each_chunk(staging, own, bytes, [&](u64 index) {
        const u64 from = staging.first(index);
#pragma unroll 1
        for (u32 peer = 0; peer < rank->ranks; ++peer) {
            if (!meeting.gives(peer) || from >= bytes[peer]) continue;
            const Line line = line_of(call.output(call.columns), call.begin[peer], call.width(peer), 1);
            const u64 to = min(from + rank->chunk_bytes, bytes[peer]);
            // A root's own tensor is in its place already.
            if (peer == me && line.data == own.data) continue;
            copy_line<true>(line, from, to, staging.slot(peer, index));
        }
    });
}
