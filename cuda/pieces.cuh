// Pushed data: pieces of 16 bytes, each 12 bytes of a tensor and the sequence number of its operation. Float64 goes in
// pieces of one element, as 12 bytes are no whole number of them. A piece is written and read in one access, so it is its
// own flag, and no bit pattern is taken from the data: where the number lies there is never anything else.
#pragma once

#include "protocol.cuh"

// What is only moved, and has no numbers.
struct Byte {
    typedef u8 Bits;
};

// The part of a tensor that one piece carries.
template <class T, u32 SIZE = sizeof(typename T::Bits)> struct Piece {
    typedef typename T::Bits Bits;
    static constexpr u32 BYTES = 12;
    static constexpr u32 COUNT = BYTES / SIZE;
    union {
        u32 words[3];
        Bits elements[COUNT];
    };
};

// One of 64 bits is put together when it is added, and never a part of a register of 64 bits before: where half of one
// was loaded and the other half kept, ptxas of CUDA 12.9 and 13 used the kept half for the address of the load (sm_90).
template <class T> struct Piece<T, 8> {
    static constexpr u32 BYTES = 8;
    static constexpr u32 COUNT = 1;
    u32 words[3];

    __device__ __forceinline__ u64 element() const { return (u64)words[1] << 32 | words[0]; }
    __device__ __forceinline__ void set(u64 element) {
        words[0] = (u32)element;
        words[1] = (u32)(element >> 32);
    }
};

template <class T> struct Pieces;
template <class T> __device__ __noinline__ uint4 load_elements(Pieces<T> pieces, u32 index);
template <class T> __device__ __noinline__ void store_elements(Pieces<T> pieces, u32 index, uint4 words);

// A tensor, or columns of it, in pieces that the threads share.
template <class T> struct Pieces {
    typedef typename T::Bits Bits;
    u64 data;
    u64 stride;   // elements from row to row
    u32 columns;  // elements side by side
    u32 total;    // elements
    bool dense;
    bool by_words;  // can be read and written 4 bytes at a time

    __device__ explicit Pieces(const View &view)
        : data(view.data), stride(view.stride), columns((u32)view.columns), total((u32)(view.rows * view.columns)),
          dense(view.rows <= 1 || view.stride == view.columns) {
        const u64 between = view.rows > 1 ? view.stride | view.columns : 0;
        by_words = sizeof(Bits) >= 4 || ((data | (between | total) * sizeof(Bits)) & 3) == 0;
    }

    __device__ u32 count() const { return (total + Piece<T>::COUNT - 1) / Piece<T>::COUNT; }

    // Calls `work` with number and address of each unit of a piece that the tensor has. Divides where there are gaps only.
    template <class Unit, class Work> __device__ __forceinline__ void each(u32 index, Work work) const {
        constexpr u32 units = Piece<T>::BYTES / sizeof(Unit);
        const u32 first = index * units;
        const u32 all = (u32)(total * sizeof(Bits) / sizeof(Unit));
        const u32 across = (u32)(columns * sizeof(Bits) / sizeof(Unit));
        const u64 apart = stride * sizeof(Bits) / sizeof(Unit);
        u64 offset = first;
        u32 column = 0;
        if (!dense) {
            const u32 row = first / across;
            column = first - row * across;
            offset = row * apart + column;
        }
#pragma unroll
        for (u32 i = 0; i < units; ++i) {
            if (first + i < all) work(i, (Unit *)data + offset);
            ++offset;
            if (!dense && ++column == across) {
                column = 0;
                offset += apart - across;
            }
        }
    }

    // What lies behind the tensor's end is zero.
    __device__ __forceinline__ void load(Piece<T> &piece, u32 index) const {
        if (by_words) {
            piece.words[0] = piece.words[1] = piece.words[2] = 0;
            each<u32>(index, [&](u32 i, const u32 *at) { piece.words[i] = *at; });
        } else {
            const uint4 words = load_elements<T>(*this, index);
            piece.words[0] = words.x, piece.words[1] = words.y, piece.words[2] = words.z;
        }
    }

    __device__ __forceinline__ void store(const Piece<T> &piece, u32 index) const {
        if (by_words) {
            each<u32>(index, [&](u32 i, u32 *at) { *at = piece.words[i]; });
        } else {
            store_elements<T>(*this, index, make_uint4(piece.words[0], piece.words[1], piece.words[2], 0));
        }
    }
};

// Element by element, which is long and rare: not inlined, and by value, so that the tensor stays in registers.
template <class T> __device__ uint4 load_elements(Pieces<T> pieces, u32 index) {
    typedef typename T::Bits Bits;
    constexpr u32 in_word = sizeof(Bits) < 4 ? 4 / sizeof(Bits) : 1;
    u32 words[3] = {};
    pieces.template each<Bits>(index, [&](u32 i, const Bits *at) {
        words[i / in_word % 3] |= (u32)*at << (8 * sizeof(Bits) * (i % in_word));
    });
    return make_uint4(words[0], words[1], words[2], 0);
}

template <class T> __device__ void store_elements(Pieces<T> pieces, u32 index, uint4 from) {
    typedef typename T::Bits Bits;
    constexpr u32 in_word = sizeof(Bits) < 4 ? 4 / sizeof(Bits) : 1;
    const u32 words[3] = {from.x, from.y, from.z};
    pieces.template each<Bits>(index, [&](u32 i, Bits *at) {
        *at = (Bits)(words[i / in_word % 3] >> (8 * sizeof(Bits) * (i % in_word)));
    });
}

__device__ __forceinline__ u32 first_piece() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u32 next_piece() { return gridDim.x * blockDim.x; }

// Pieces that one thread has under way at once: `first` and those that come next for it.
template <class T, u32 HELD> struct Batch {
    Piece<T> pieces[HELD];

    __device__ static u32 step() { return HELD * next_piece(); }

    __device__ __forceinline__ void load(const Pieces<T> &tensor, u32 first) {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            const u32 index = first + i * next_piece();
            if (index < tensor.count()) tensor.load(pieces[i], index);
        }
    }

    __device__ __forceinline__ void store(const Pieces<T> &tensor, u32 first) const {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            const u32 index = first + i * next_piece();
            if (index < tensor.count()) tensor.store(pieces[i], index);
        }
    }

    // Writes those of `count` pieces to an area.
    __device__ __forceinline__ void push(uint4 *area, u32 first, u32 count, u32 sequence) const {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            const u32 index = first + i * next_piece();
            const u32 *words = pieces[i].words;
            if (index < count) store_whole(area + index, make_uint4(words[0], words[1], words[2], sequence));
        }
    }

    __device__ __forceinline__ void take(const uint4 (&come)[HELD]) {
#pragma unroll
        for (u32 i = 0; i < HELD; ++i) {
            pieces[i].words[0] = come[i].x, pieces[i].words[1] = come[i].y, pieces[i].words[2] = come[i].z;
        }
    }
};

// Where the pieces that go from one rank to another lie behind the inbox.
__device__ __forceinline__ uint4 *pushed(const Call &call, Inbox *inbox) {
    return (uint4 *)((u8 *)inbox + sizeof(Inbox) + (call.sequence() & 1) * call.rank()->area_bytes);
}
