// The kernels, one for each operation and element type. All take one `Call`, except those that no ranks meet in; those
// between copies of the engines also a `Step`.
#include "engines.cuh"
#include "small.cuh"
#include "staged.cuh"

// Whether every rank uses every other's tensors where they are.
__device__ __forceinline__ bool all_direct(const Call &call, const Meeting &meeting) {
    bool direct = call.rank()->connected != 0;
#pragma unroll 1
    for (u32 peer = 0; peer < call.rank()->ranks; ++peer) {
        direct &= !meeting.present(peer) || (meeting.peers[peer].role & PLAIN) != 0;
    }
    return direct;
}

template <class T> __device__ __forceinline__ void all_reduce_large(const Call &call) {
    together(call, [&](Meeting &meeting) {
        if (!all_direct(call, meeting)) return all_reduce_staged<T>(call, meeting);
        all_reduce_in_place<T>(call, meeting);
        return true;
    });
}

template <class T> __device__ __forceinline__ void reduce_scatter(const Call &call) {
    together(call, [&](Meeting &meeting) {
        if (!all_direct(call, meeting)) return reduce_scatter_staged<T>(call, meeting);
        reduce_scatter_direct<T>(call, meeting);
        return true;
    });
}

// Those that wait for the kernel before are launched so that they need to (src/comm/cuda/text.rs), and do so before they use
// any memory but their parameters. None lets the next one start early: its blocks could take the place of those that this
// one's peers wait for.
#define SUMS(name, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) all_reduce_small_##name(const __grid_constant__ Call call) { \
        all_reduce_small<T>(call);                                                                                  \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) all_reduce_large_##name(const __grid_constant__ Call call) { \
        wait_for_kernel_before();                                                                                   \
        all_reduce_large<T>(call);                                                                                  \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) reduce_scatter_small_##name(const __grid_constant__ Call call) { \
        reduce_scatter_small<T>(call);                                                                              \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) reduce_scatter_##name(const __grid_constant__ Call call) { \
        wait_for_kernel_before();                                                                                   \
        reduce_scatter<T>(call);                                                                                    \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) add_residual_##name(const __grid_constant__ Call call) { \
        wait_for_kernel_before();                                                                                   \
        add_residual<T>(call);                                                                                      \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                        \
    engines_sum_##name(const __grid_constant__ Call call, const __grid_constant__ Step step) {                      \
        engines_sum<T>(call, step);                                                                                 \
    }

SUMS(f64, Double)
SUMS(f32, Float)
SUMS(f16, Half)
SUMS(bf16, BrainFloat)
SUMS(f8e4m3, E4M3)
SUMS(f8e5m2, E5M2)

// Broadcast, gather to a rank, all_gather: everyone who gets anything takes it. Columns are in bytes. With neither
// to give nor to get it is a barrier.
extern "C" __global__ void __launch_bounds__(THREADS, 1) take(const __grid_constant__ Call call) {
    wait_for_kernel_before();
    together(call, [&](Meeting &meeting) {
        take_direct(call, meeting);
        return all_direct(call, meeting) || take_staged(call, meeting);
    });
}

// The same for little data.
extern "C" __global__ void __launch_bounds__(THREADS, 1) take_small(const __grid_constant__ Call call) {
    move_small(call);
}

// Rows that several ranks of a device copy to or from host memory, each by the blocks of one `blockIdx.y`.
struct Copies {
    u32 *leaving;  // blocks that are done, in device memory
    u32 *done;     // in host memory; 0 where nobody waits
    u32 value;     // what the last block writes there
    u32 unused;
    Rows rows[MOST_RANKS];
};

// Copies rows between places that one device sees. The host looks at a word instead of waiting for the stream, which
// would take longer than small copies.
extern "C" __global__ void __launch_bounds__(THREADS, 1) copy(const __grid_constant__ Copies copies) {
    copy_rows(copies.rows[blockIdx.y]);
    if (copies.done == nullptr) return;
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();
    if (atomicAdd(copies.leaving, 1) == gridDim.x * gridDim.y - 1) {
        *copies.leaving = 0;
        __threadfence_system();
        *(volatile u32 *)copies.done = copies.value;
    }
}

// The sizes that src/comm/cuda/layout.rs must agree with.
extern "C" __device__ const u32 tp_rs_layout[7] = {sizeof(Status), sizeof(Inbox), sizeof(Rank), sizeof(Call), sizeof(Copies),
                                                    sizeof(Step), THREADS};

// Writes a pattern to a peer's memory, or checks it there: the number of wrong words is added to `wrong`.
extern "C" __global__ void write_pattern(u32 *memory, u32 words, u32 seed) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
        memory[i] = (i ^ seed) * 2654435761u;
    }
    __threadfence_system();
}

extern "C" __global__ void check_pattern(const u32 *memory, u32 words, u32 seed, u32 *wrong) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
        if (load_volatile(memory + i) != (i ^ seed) * 2654435761u) atomicAdd(wrong, 1);
    }
}
