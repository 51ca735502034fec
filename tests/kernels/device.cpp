// Runs kernels on one thread of the CPU, in an order drawn from a seed: the same seed gives the same run.
//
// Every thread of every block has a stack of its own and is left only where it pauses. Ranks run in bursts, some
// faster than others. While a rank runs, memory out of its reach is closed to it. Time is the number of pauses.
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

// After what it would redefine words of.
#include "primitives.cuh"
#include "tp_rs.cu"

Place gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

// What a launch's parameter is.
enum Kind : u32 { CALL, COPIES, WRITE, STEPPED, MOVE };

struct Stepped {
    Call call;
    Step step;
};

// What a copy engine does.
struct Move {
    u8 *target;
    const u8 *source;
    u64 bytes;
};

// Written by the host while kernels run.
struct Write {
    u32 *word;
    u32 value;
    u32 pauses;  // before it
};

constexpr u32 NOBODY = MOST_RANKS;  // the rank of what the host does

struct Launch {
    void (*kernel)();
    const void *parameter;
    u32 kind;
    u32 blocks;
    u32 members;
    u32 threads;
    u32 ranks[MOST_RANKS];  // of the members
    u32 lane;               // in which launches of a rank follow each other; those of lane 0 come after and before all
};

// Pages that only some ranks may use.
struct Region {
    u8 *memory;
    u64 bytes;
    u32 ranks;  // a bit each
    u32 open;
};

struct Block;

// One thread and its stack.
struct Fiber {
    jmp_buf place;
    ucontext_t context;
    u8 *stack;
    bool started;
    Block *block;
    u32 thread;
};

struct Warp {
    u32 arrived, turn;
    u32 values[2][32];
};

struct Block {
    const Launch *launch;
    u32 index, member, rank;
    u32 left;           // threads that have not ended
    u32 waiting, turn;  // at the barrier
    bool votes, vote[2];
    std::vector<u32> ready;
    std::vector<Fiber *> fibers;
    std::vector<Warp> warps;
    alignas(16) u8 shared[2048];
};

constexpr size_t STACK = 64 << 10;
constexpr u64 MOST_PAUSES = 400000000;

struct Device {
    u64 seed, clock;
    jmp_buf scheduler;
    sigjmp_buf crashed;
    Fiber *running;
    bool again;  // the running thread goes on later
    u32 rank, burst;
    std::vector<Region> regions;
    std::vector<std::vector<Block *>> blocks;  // of each rank
    char *problem;
    size_t room;
};
static Device device;
static std::vector<Fiber *> idle;

static u32 draw(u32 below) {
    device.seed ^= device.seed << 13;
    device.seed ^= device.seed >> 7;
    device.seed ^= device.seed << 17;
    return (u32)((device.seed * 2685821657736338717ull >> 33) % below);
}

void complain(const char *what, const void *at) {
    if (device.problem[0] != 0) return;
    const Fiber *by = device.running;
    if (by == nullptr) {
        snprintf(device.problem, device.room, "%s", what);
        return;
    }
    snprintf(device.problem, device.room, "%s at %p by rank %u, block %u, thread %u", what, at, by->block->rank,
             by->block->index, by->thread);
}

static __attribute__((noinline)) void to_scheduler(bool again) {
    device.again = again;
    if (_setjmp(device.running->place) == 0) _longjmp(device.scheduler, 1);
}

void pause() { to_scheduler(true); }

void maybe_pause() {
    if (draw(8) == 0) to_scheduler(true);
}

void rarely_pause() {
    if (draw(64) == 0) to_scheduler(true);
}

u64 now() { return device.clock + 1; }

void *shared(size_t bytes) {
    if (bytes > sizeof(Block::shared)) complain("too much shared memory", nullptr);
    return device.running->block->shared;
}

bool barrier(bool value, bool votes) {
    Block &block = *device.running->block;
    if (block.waiting > 0 && block.votes != votes) complain("different barriers", nullptr);
    block.votes = votes;
    const u32 turn = block.turn;
    if (block.waiting == 0) block.vote[turn & 1] = false;
    block.vote[turn & 1] |= value;
    if (++block.waiting < block.launch->threads) {
        while (block.turn == turn) to_scheduler(false);
        return block.vote[turn & 1];
    }
    block.waiting = 0;
    ++block.turn;
    const u32 me = device.running->thread;
    block.ready.clear();
    for (u32 thread = 0; thread < block.launch->threads; ++thread) {
        if (thread != me) block.ready.push_back(thread);
    }
    to_scheduler(true);
    return block.vote[turn & 1];
}

const u32 *exchange(u32 value) {
    const u32 me = device.running->thread, place = me % 32;
    Block &block = *device.running->block;
    Warp &warp = block.warps[me / 32];
    const u32 turn = warp.turn;
    warp.values[turn & 1][place] = value;
    if (++warp.arrived < 32) {
        while (warp.turn == turn) to_scheduler(false);
    } else {
        warp.arrived = 0;
        ++warp.turn;
        for (u32 other = 0; other < 32; ++other) {
            if (other != place) block.ready.push_back(me / 32 * 32 + other);
        }
    }
    return warp.values[turn & 1];
}

static void execute(const Launch &launch) {
    if (launch.kind == CALL) {
        ((void (*)(Call))launch.kernel)(*(const Call *)launch.parameter);
    } else if (launch.kind == COPIES) {
        ((void (*)(Copies))launch.kernel)(*(const Copies *)launch.parameter);
    } else if (launch.kind == STEPPED) {
        const Stepped &both = *(const Stepped *)launch.parameter;
        ((void (*)(Call, Step))launch.kernel)(both.call, both.step);
    } else if (launch.kind == MOVE) {
        const Move &move = *(const Move *)launch.parameter;
        for (u64 i = 0; i < move.bytes; ++i) {
            if (i % 16 == 0) maybe_pause();
            ((volatile u8 *)move.target)[i] = ((const volatile u8 *)move.source)[i];
        }
    } else {
        const Write &write = *(const Write *)launch.parameter;
        for (u32 i = 0; i < write.pauses; ++i) pause();
        *(volatile u32 *)write.word = write.value;
    }
}

// What a stack is for: one thread of a block after the other.
static void work() {
    for (;;) {
        execute(*device.running->block->launch);
        --device.running->block->left;
        idle.push_back(device.running);
        to_scheduler(false);
    }
}

static Fiber *fiber(Block *block, u32 thread) {
    if (idle.empty()) {
        Fiber *made = new Fiber();
        made->stack = (u8 *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        getcontext(&made->context);
        made->context.uc_stack.ss_sp = made->stack;
        made->context.uc_stack.ss_size = STACK;
        makecontext(&made->context, work, 0);
        idle.push_back(made);
    }
    Fiber *fiber = idle.back();
    idle.pop_back();
    fiber->block = block;
    fiber->thread = thread;
    return fiber;
}

static void start(const Launch &launch) {
    for (u32 member = 0; member < launch.members; ++member) {
        for (u32 index = 0; index < launch.blocks; ++index) {
            Block *block = new Block();
            block->launch = &launch;
            block->index = index;
            block->member = member;
            block->rank = launch.ranks[member];
            block->left = launch.threads;
            block->warps.resize((launch.threads + 31) / 32);
            for (u32 at = 0; at < sizeof block->shared; ++at) block->shared[at] = (u8)draw(256);
            for (u32 thread = 0; thread < launch.threads; ++thread) {
                block->fibers.push_back(fiber(block, thread));
                block->ready.push_back(thread);
            }
            device.blocks[block->rank].push_back(block);
        }
    }
}

static void protect(u32 rank) {
    for (Region &region : device.regions) {
        const u32 open = rank == NOBODY || (region.ranks >> rank & 1) != 0;
        if (open == region.open) continue;
        mprotect(region.memory, region.bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
        region.open = open;
    }
}

static void fault(int, siginfo_t *info, void *) {
    u8 *at = (u8 *)info->si_addr;
    for (Region &region : device.regions) {
        if (at < region.memory || at >= region.memory + region.bytes || region.open) continue;
        complain("memory out of reach is used", at);
        mprotect(region.memory, region.bytes, PROT_READ | PROT_WRITE);
        region.open = 1;
        return;
    }
    complain("memory of nobody is used", at);
    siglongjmp(device.crashed, 1);
}

static __attribute__((noinline)) void resume(Fiber *fiber) {
    const Block &block = *fiber->block;
    device.running = fiber;
    gridDim = Place{block.launch->blocks, block.launch->members};
    blockDim = Place{block.launch->threads, 1};
    blockIdx = Place{block.index, block.member};
    threadIdx = Place{fiber->thread, 0};
    if (_setjmp(device.scheduler) == 0) {
        if (fiber->started) _longjmp(fiber->place, 1);
        fiber->started = true;
        setcontext(&fiber->context);
    }
    device.running = nullptr;
}

// A block of the rank that can go on.
static Block *choose(std::vector<Block *> &blocks) {
    if (blocks.empty()) return nullptr;
    const u32 count = (u32)blocks.size(), first = draw(count);
    for (u32 i = 0; i < count; ++i) {
        if (Block *block = blocks[(first + i) % count]; !block->ready.empty()) return block;
    }
    return nullptr;
}

static bool step(const u32 *speed) {
    if (device.burst == 0) {
        device.rank = draw(NOBODY + 1);
        device.burst = 1 + draw(64 * speed[device.rank]);
    }
    --device.burst;
    Block *block = choose(device.blocks[device.rank]);
    for (u32 i = 0; block == nullptr && i <= NOBODY; ++i) {
        device.rank = (device.rank + 1) % (NOBODY + 1);
        device.burst = draw(64 * speed[device.rank]);
        block = choose(device.blocks[device.rank]);
    }
    if (block == nullptr) return false;
    protect(device.rank);
    const u32 place = draw((u32)block->ready.size());
    const u32 thread = block->ready[place];
    block->ready[place] = block->ready.back();
    block->ready.pop_back();
    ++device.clock;
    resume(block->fibers[thread]);
    if (device.again) block->ready.push_back(thread);
    return true;
}

// Takes away blocks that have ended.
static void sweep() {
    for (std::vector<Block *> &blocks : device.blocks) {
        for (size_t i = 0; i < blocks.size();) {
            if (blocks[i]->left > 0) {
                ++i;
                continue;
            }
            delete blocks[i];
            blocks[i] = blocks.back();
            blocks.pop_back();
        }
    }
}

// Starts the launches whose ranks have ended all earlier ones of their lane; whether none is left.
static bool start_next(std::vector<const Launch *> &waiting) {
    u32 busy[NOBODY + 1] = {};  // a bit for each lane of a rank
    for (u32 rank = 0; rank <= NOBODY; ++rank) {
        for (const Block *block : device.blocks[rank]) busy[rank] |= 1u << block->launch->lane;
    }
    std::vector<const Launch *> later;
    for (const Launch *launch : waiting) {
        const u32 held = launch->lane == 0 ? ~0u : 1u | 1u << launch->lane;
        bool free = true;
        for (u32 member = 0; member < launch->members; ++member) free &= (busy[launch->ranks[member]] & held) == 0;
        if (free) {
            start(*launch);
        } else {
            later.push_back(launch);
        }
        for (u32 member = 0; member < launch->members; ++member) busy[launch->ranks[member]] |= 1u << launch->lane;
    }
    waiting = later;
    return waiting.empty();
}

static void run(const Launch *launches, u32 count) {
    u32 speed[NOBODY + 1];
    for (u32 &of : speed) of = 1u << 2 * draw(3);
    std::vector<const Launch *> waiting;
    for (u32 i = 0; i < count; ++i) waiting.push_back(launches + i);
    for (const u64 begin = device.clock; device.clock - begin < MOST_PAUSES;) {
        const bool all = start_next(waiting);
        bool alive = true;
        for (u32 i = 0; alive && i < 64; ++i) alive = step(speed);
        sweep();
        if (alive) continue;
        for (const std::vector<Block *> &blocks : device.blocks) {
            if (!blocks.empty()) return complain("threads wait for others of their block that do not come", nullptr);
        }
        if (all) return;
    }
    complain("kernels do not end", nullptr);
}

}  // namespace emulation

// What the compiler calls where it sees an access that is not aligned.
extern "C" void __ubsan_handle_type_mismatch_v1(void *, void *at) {
    emulation::complain("an access that is not aligned", at);
}

// Runs all launches to their end. 0, or 1 with a problem told.
extern "C" int tp_rs_run(const emulation::Launch *launches, u32 count, const emulation::Region *regions,
                         u32 region_count, u64 seed, char *problem, u64 room) {
    using namespace emulation;
    device.seed = seed | 1;
    device.problem = problem;
    device.room = room;
    problem[0] = 0;
    device.running = nullptr;
    device.burst = 0;
    device.regions.assign(regions, regions + region_count);
    for (Region &region : device.regions) region.open = 1;
    device.blocks.assign(NOBODY + 1, {});

    static u8 *stack = new u8[STACK];
    stack_t signals = {}, before = {};
    signals.ss_sp = stack;
    signals.ss_size = STACK;
    sigaltstack(&signals, &before);
    struct sigaction action = {}, segv = {}, bus = {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    if (sigsetjmp(device.crashed, 1) == 0) run(launches, count);
    device.running = nullptr;
    protect(NOBODY);
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaltstack(&before, nullptr);
    return problem[0] != 0;
}
