// How ranks meet: what they share, how they wait, and how a wait ends.
//
// Every operation is one kernel a rank. Kernels of one operation find each other by a sequence number that each
// rank counts in its own memory, so that a captured graph can be replayed any number of times. A kernel tells its
// peers what it brings by a letter in their inbox, waits for theirs, and works. All waits are bounded.
//
// The layouts below are read by src/comm/cuda/layout.rs, which asserts their sizes.
#pragma once

#include <primitives.cuh>

constexpr u32 MOST_RANKS = 16;
// Blocks of one rank that may stage; flags are kept for so many.
constexpr u32 MOST_STAGING_BLOCKS = 64;
constexpr u32 THREADS = 512;

// What a rank brings (Call::role, Letter::role).
constexpr u32 GIVES = 1;
constexpr u32 GETS = 2;
// The rank's tensors lie in memory that every peer with access to the device can use.
constexpr u32 PLAIN = 4;

// Why a communicator stopped (Status::state).
constexpr u32 TIMED_OUT = 1;
constexpr u32 DISAGREED = 2;
constexpr u32 TOLD_BY_PEER = 3;
constexpr u32 TOLD_BY_HOST = 4;

// In host memory that the device sees: what the host reads when it looks after a rank.
struct Status {
    u32 state;
    u32 sequence;
    u32 missing;    // a bit for each rank that did not come, or that made another call
    u32 signature;  // of the call that did not succeed
};

// Values beside the sequence number they belong to, in accesses of 8 bytes: whoever sees the number sees the value.
struct Letter {
    u32 words[8][2];  // signature, role, data (low, high), stride (low, high), two unused
};

// A sequence number, or a sequence number << 24 | chunks. Each has a line of its own: in host memory, looks at the same
// line from several blocks are served one after the other, a microsecond each.
struct Flag {
    u64 value;
    u64 unused[15];
};

// Memory that one rank writes and one other reads. It lies with the reader where the writer can reach that, else
// in host memory.
struct Inbox {
    Letter letters[2];                   // of even and odd operations
    Flag finished;                       // the operation: the writer needs nothing of the reader any more
    u32 stop;                            // the writer stopped
    u32 unused[31];
    Flag staged[MOST_STAGING_BLOCKS];    // chunks that the writer's block has staged
    Flag consumed[MOST_STAGING_BLOCKS];  // chunks of the reader that the writer's block is done with
    Flag summed[MOST_STAGING_BLOCKS];    // chunks that the writer's block has summed
    // Behind it: two areas for pushed pieces (pieces.cuh), of even and odd operations.
};

// One rank. Everything up to `sequence` is constant.
struct Rank {
    u32 rank;
    u32 ranks;
    u32 slot_bytes;              // of one slot of one block; a multiple of 16
    u32 slots;                   // of one block; at least 3
    u64 area_bytes;              // of one area for pushed pieces; a multiple of 16
    Inbox *out[MOST_RANKS];      // written by this rank, read by that one
    Inbox *in[MOST_RANKS];       // written by that rank, read by this one
    u8 *stage[MOST_RANKS];       // each rank's staging memory, as this rank sees it
    Letter *seen[MOST_RANKS];    // both letters of each rank where blocks but the first look for them
    Status *status;
    const u32 *stop;             // set by the host
    u16 reaches;                 // a bit for each rank whose memory this one reads and writes
    u16 reached;                 // a bit for each rank that reads and writes this one's memory
    u16 connected;               // whether all ranks reach all others
    u16 staging_blocks;          // that have slots
    u64 sequence;                // operations that are done; 32 bits would be full within a day
    u32 leaving;                 // blocks of the running one that are done
    u32 broken;
};

struct View {
    u64 data;
    u64 rows;
    u64 columns;  // elements side by side
    u64 stride;   // elements from row to row
};

// What one rank brings to an operation.
struct Member {
    Rank *rank;
    u64 input;
    u64 input_stride;  // elements from row to row
    u64 output;
    u64 output_stride;
    u32 role;
    u32 index;  // the rank's number
};

// A peer of the running operation.
struct Peer {
    u64 data;
    u64 stride;
    u32 role;
    u32 padding;
};

// Whom an operation brings together, as one block of one rank sees it.
struct Meeting {
    Peer peers[MOST_RANKS];

    // Of the ranks that give or get anything.
    __device__ bool present(u32 peer) const { return (peers[peer].role & (GIVES | GETS)) != 0; }
    __device__ bool gives(u32 peer) const { return (peers[peer].role & GIVES) != 0; }
    __device__ bool gets(u32 peer) const { return (peers[peer].role & GETS) != 0; }
};

// What the threads of a block share. The rank's record is copied when the kernel begins: the first look at any line of
// it would take as long as a tenth of a small sum, and no two of them would be under way at once.
struct Shared {
    Rank rank;
    Meeting meeting;
};

// Kernel parameter of every operation. Ranks that share a stream share a launch, of which each has the blocks of
// one `blockIdx.y`: kernels that follow each other on a stream could not wait for each other.
struct Call {
    u64 timeout;    // ns
    u64 rows;
    u64 columns;    // of the whole
    u32 signature;  // of what all ranks have to agree on
    u32 targets;    // a bit for each rank that may get anything
    u32 ranks;      // of the communicator
    u32 widest;     // the most columns that one rank gives or gets
    // Columns that each rank gives to the whole, or gets of it, and where in its own part they begin.
    u32 begin[MOST_RANKS];
    u32 end[MOST_RANKS];
    u32 skip[MOST_RANKS];
    Member members[MOST_RANKS];

    __device__ __forceinline__ const Member &me() const { return members[blockIdx.y]; }
    // The record itself: for what changes while kernels run.
    __device__ __forceinline__ Rank *record() const { return me().rank; }
    // As it was when the kernel began.
    __device__ __forceinline__ const Rank *rank() const { return &shared_by_block<Shared>().rank; }
    // The number of the running operation.
    __device__ __forceinline__ u64 sequence() const { return rank()->sequence + 1; }
    __device__ __forceinline__ u32 role() const { return me().role; }
    __device__ __forceinline__ bool gives() const { return (role() & GIVES) != 0; }
    __device__ __forceinline__ bool gets() const { return (role() & GETS) != 0; }
    __device__ __forceinline__ u32 width(u32 peer) const {
        return end[peer] > begin[peer] ? end[peer] - begin[peer] : 0;
    }
    // The rank that comes so many after this one, of the ring of all. For what begins before the record has come.
    __device__ __forceinline__ u32 after(u32 hop) const {
        const u32 peer = me().index + hop;
        return peer < ranks ? peer : peer - ranks;
    }
    __device__ __forceinline__ View input(u64 wide) const {
        return View{me().input, rows, wide, me().input_stride};
    }
    __device__ __forceinline__ View output(u64 wide) const {
        return View{me().output, rows, wide, me().output_stride};
    }
};

// Marks the rank as stopped and says why, once; tells the peers, so that they need not wait in vain.
__device__ __noinline__ void stop(const Call &call, u32 state, u32 missing) {
    if (atomicExch(&call.record()->broken, 1) != 0) return;
    const Rank *rank = call.rank();
    volatile Status *status = rank->status;
    status->sequence = (u32)call.sequence();
    status->missing = missing;
    status->signature = call.signature;
    __threadfence_system();
    status->state = state;
#pragma unroll 1
    for (u32 peer = 0; peer < rank->ranks; ++peer) {
        if (peer != rank->rank) *(volatile u32 *)&rank->out[peer]->stop = 1;
    }
    __threadfence_system();
}

// The ranks whose letters of the running operation are not there.
__device__ __noinline__ u32 absent(const Call &call) {
    const Rank *rank = call.rank();
    const u32 sequence = (u32)call.sequence();
    u32 missing = 0;
#pragma unroll 1
    for (u32 peer = 0; peer < rank->ranks; ++peer) {
        if (peer != rank->rank && load_volatile(&rank->in[peer]->letters[sequence & 1].words[0][1]) != sequence) {
            missing |= 1u << peer;
        }
    }
    return missing;
}

// Ends waits. Its `over` is asked at every fruitless look and does something at every 1024th only. Once over, it stays
// so: a wait may look in two places.
struct Patience {
    const Call &call;
    u32 looks = 0;
    bool ended = false;
    u64 since = 0;

    __device__ explicit Patience(const Call &call) : call(call) {}

    // Whether waiting for `peer` has to end.
    __device__ bool over(u32 peer) {
        if (!ended && (++looks & 1023) == 0) ended = ask(peer);
        return ended;
    }

  private:
    __device__ __noinline__ bool ask(u32 peer) {
        const Rank *rank = call.rank();
        if (load_volatile(&call.record()->broken)) return true;
        if (load_volatile(rank->stop)) {
            stop(call, TOLD_BY_HOST, 0);
            return true;
        }
        if (load_volatile(&rank->in[peer]->stop)) {
            stop(call, TOLD_BY_PEER, 1u << peer);
            return true;
        }
        const u64 now = nanoseconds();
        if (since == 0) since = now;
        if (now - since < call.timeout) return false;
        stop(call, TIMED_OUT, absent(call) | 1u << peer);
        return true;
    }
};

// The rank's record on its way: asked for when this is made, and the block's when `share` has ended, in a barrier. What a
// kernel does between the two costs no time of its own.
class Fetch {
    static constexpr u32 PIECES = sizeof(Rank) / sizeof(uint4);
    static_assert(sizeof(Rank) % sizeof(uint4) == 0, "copied in other pieces");
    const uint4 *record;
    uint4 first = {};

  public:
    __device__ __forceinline__ explicit Fetch(const Call &call) : record((const uint4 *)call.record()) {
        if (threadIdx.x < PIECES) first = load_volatile(record + threadIdx.x);
    }

    __device__ __forceinline__ void share() const {
        uint4 *copy = (uint4 *)&shared_by_block<Shared>().rank;
        if (threadIdx.x < PIECES) copy[threadIdx.x] = first;
#pragma unroll 1
        for (u32 piece = threadIdx.x + blockDim.x; piece < PIECES; piece += blockDim.x) {
            copy[piece] = load_volatile(record + piece);
        }
        __syncthreads();
    }
};

// Copies the rank's record. Ends in a barrier of the block.
__device__ __forceinline__ void begin(const Call &call) { Fetch(call).share(); }

// Writes this rank's letters. Addresses are told only where peers use them.
template <bool ADDRESSES> __device__ __forceinline__ void announce(const Call &call) {
    const Rank *rank = call.rank();
    const u32 sequence = (u32)call.sequence();
    const u32 peer = threadIdx.x;
    if (blockIdx.x == 0 && peer < rank->ranks && peer != rank->rank) {
        const u64 data = call.gives() ? call.me().input : call.me().output;
        const u64 stride = call.gives() ? call.me().input_stride : call.me().output_stride;
        uint4 *letter = (uint4 *)&rank->out[peer]->letters[sequence & 1];
        store_volatile(letter, make_uint4(call.signature, sequence, call.role(), sequence));
        if (!ADDRESSES) return;
        store_volatile(letter + 1, make_uint4((u32)data, sequence, (u32)(data >> 32), sequence));
        store_volatile(letter + 2, make_uint4((u32)stride, sequence, (u32)(stride >> 32), sequence));
    }
}

// Whether both this rank and the writer of a letter bring something.
__device__ __forceinline__ bool both_bring(const Call &call, const uint4 &what) {
    return (what.z & (GIVES | GETS)) != 0 && (call.role() & (GIVES | GETS)) != 0;
}

// Whether a peer that brings something made the same call. A rank that only comes need not have.
__device__ __forceinline__ bool agrees(const Call &call, u32 peer, const uint4 &what) {
    if (!both_bring(call, what) || what.x == call.signature) return true;
    stop(call, DISAGREED, 1u << peer);
    return false;
}

// Waits for the first part of a peer's letter and, with `addresses`, for the others. Small sums don't write those, and a
// rank that only comes to one needs none. One look takes as long as the way to memory, so all parts are looked at together.
// The first block passes on what it reads where letters come to host memory, which all blocks would look at one after the
// other. What the peer wrote before its letter can be read after it, by the whole block after a barrier.
__device__ __noinline__ bool read_letter(const Call &call, u32 peer, uint4 *letter, bool addresses) {
    const Rank *rank = call.rank();
    const u32 sequence = (u32)call.sequence();
    const uint4 *own = (const uint4 *)&rank->in[peer]->letters[sequence & 1];
    uint4 *seen = (uint4 *)&rank->seen[peer][sequence & 1];
    const uint4 *from = blockIdx.x == 0 ? own : seen;
    Patience patience(call);
    bool known = false;
    for (;;) {
#pragma unroll
        for (u32 part = 0; part < 3; ++part) {
            if (part == 0 || addresses) letter[part] = load_acquire(from + part);
        }
        const auto come = [&](const uint4 &part) { return part.y == sequence && part.w == sequence; };
        if (!known && come(letter[0])) {
            if (!agrees(call, peer, letter[0])) return false;
            known = true;
        }
        const bool wanted = addresses && both_bring(call, letter[0]);
        if (known && (!wanted || (come(letter[1]) && come(letter[2])))) {
            if (blockIdx.x != 0 || seen == own) return true;
#pragma unroll
            for (u32 part = 0; part < 3; ++part) {
                if (part == 0 || wanted) store_volatile(seen + part, letter[part]);
            }
            return true;
        }
        if (patience.over(peer)) return false;
    }
}

// Waits for all letters. Ends in a barrier of the block, whose threads all return the same. False: leave at once.
__device__ __noinline__ bool meet(const Call &call, Meeting &meeting) {
    const Rank *rank = call.rank();
    bool alive = rank->broken == 0;
    const u32 peer = threadIdx.x;
    if (alive && peer < rank->ranks) {
        Peer &about = meeting.peers[peer];
        if (peer == rank->rank) {
            about.data = call.gives() ? call.me().input : call.me().output;
            about.stride = call.gives() ? call.me().input_stride : call.me().output_stride;
            about.role = call.role();
        } else {
            uint4 letter[3] = {};
            alive = read_letter(call, peer, letter, true);
            about.data = letter[1].x | (u64)letter[1].z << 32;
            about.stride = letter[2].x | (u64)letter[2].z << 32;
            about.role = letter[0].z;
        }
    }
    return !__syncthreads_or(!alive);
}

// Waits until the u64 that `peer` writes has come to `least`.
__device__ __noinline__ bool wait_for(const Call &call, const u64 *flag, u64 least, u32 peer) {
    Patience patience(call);
    while (load_acquire(flag) < least) {
        if (patience.over(peer)) return false;
    }
    return true;
}

// Ends an operation. The last block to come here counts it; with a meeting, first it waits until no peer needs this
// rank's memory any more and all that peers write here has been written.
__device__ __noinline__ void leave(const Call &call, const Meeting *meeting) {
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const Rank *rank = call.rank();
    Rank *record = call.record();
    u32 last = 0;
    // Who is last has acquired what all blocks released: its own release below, cumulative, hands that on to the peers.
    if (threadIdx.x == 0) last = gridDim.x == 1 || count_up(&record->leaving) == gridDim.x - 1;
    if (__shfl_sync(WARP, last, 0) == 0) return;
    __syncwarp();
    const u32 peer = threadIdx.x;
    if (meeting != nullptr && peer < rank->ranks && peer != rank->rank && meeting->present(peer)) {
        store_release(&rank->out[peer]->finished.value, call.sequence());
        wait_for(call, &rank->in[peer]->finished.value, call.sequence(), peer);
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        record->leaving = 0;
        record->sequence = call.sequence();
    }
}

// Announces, meets, works and leaves. `work` returns whether it came to its end.
template <class Work> __device__ __forceinline__ void together(const Call &call, Work work) {
    Meeting &meeting = shared_by_block<Shared>().meeting;
    begin(call);
    announce<true>(call);
    const bool came = meet(call, meeting);
    const bool done = came && (call.role() & (GIVES | GETS)) != 0 && work(meeting);
    leave(call, done ? &meeting : nullptr);
}

// A rank without a part, which shares a launch with ranks that have one, waits for all letters: so it is never two
// operations ahead of a peer.
__device__ __noinline__ void only_come(const Call &call) {
    together(call, [](Meeting &) { return false; });
}

// Counts an operation in which nobody uses a peer's tensors: the block that was the last to begin does so, since all have
// read the record then. Asked for when a block begins and used when it ends, the count keeps nobody waiting.
struct Count {
    u32 before = 0;

    __device__ explicit Count(const Call &call) {
        if (threadIdx.x == 0) before = atomicAdd(&call.record()->leaving, 1);
    }

    __device__ void end(const Call &call) const {
        if (threadIdx.x != 0 || before != gridDim.x - 1) return;
        call.record()->leaving = 0;
        call.record()->sequence = call.sequence();
    }
};
