// Linear over NF4 weights for few rows: y[t, n] = sum_k x[t, k] * level[code[n, k]] * absmax[n, k / 64].
//
// Each worker of the split (SplitK) adds what it has of a tile of 256 outputs into its own slot of the workspace,
// and `nf4_reduce` adds the slots in order. The cut depends on the shape of the weight and the number of workers
// alone, so a row's sums are formed in the same order whatever the number of rows is.
//
// The weights are the A operand of the matrix instruction (tokens are its n side). One packed byte is two weights
// next to each other along the inputs; a table in shared memory turns it into a pair of bf16 levels. The table is
// replicated over the 32 banks, so that lanes never collide. The accumulator is kept in units of the current
// group's absmax (acc *= previous / current), so no weight is rounded after its level and no second accumulator is
// needed.

// Word `lane` of entry (first << 4 | second) becomes the pair for that byte.
template <int WARPS>
__device__ __forceinline__ void fill_table(u8* table, const PartialsParams& p) {
    const int lane = threadIdx.x & 31;
    for (int second = threadIdx.x >> 5; second < 16; second += WARPS) {
        const u32 high = (p.levels[second >> 1] >> (second & 1) * 16) << 16;
#pragma unroll
        for (int first = 0; first < 16; ++first) {
            const u32 low = (p.levels[first >> 1] >> (first & 1) * 16) & 0xffff;
            *reinterpret_cast<u32*>(table + (first * 16 + second) * TABLE_STRIDE + lane * 4) = high | low;
        }
    }
}

// Four packed bytes to the four registers of an A operand.
__device__ __forceinline__ void decode(u32 (&a)[4], u32 word, const u8* table, u32 lane4) {
#if TABLE_STRIDE == 256
    a[0] = *reinterpret_cast<const u32*>(table + __byte_perm(word, lane4, 0x5504));
    a[1] = *reinterpret_cast<const u32*>(table + __byte_perm(word, lane4, 0x5514));
    a[2] = *reinterpret_cast<const u32*>(table + __byte_perm(word, lane4, 0x5524));
    a[3] = *reinterpret_cast<const u32*>(table + __byte_perm(word, lane4, 0x5534));
#else
    a[0] = *reinterpret_cast<const u32*>(table + (((word << 7) & 0x7f80) | lane4));
    a[1] = *reinterpret_cast<const u32*>(table + (((word >> 1) & 0x7f80) | lane4));
    a[2] = *reinterpret_cast<const u32*>(table + (((word >> 9) & 0x7f80) | lane4));
    a[3] = *reinterpret_cast<const u32*>(table + (((word >> 17) & 0x7f80) | lane4));
#endif
}

// What comes before the first product; LoRA's shrink, if it is part of the launch, is done when this returns.
template <int WARPS, class Feed, class Lora>
__device__ __forceinline__ void start(Feed& feed, Lora& lora, const PartialsParams& p) {
    extern __shared__ __align__(1024) u8 shared[];
    let_dependents_start();
    feed.prepare();
    feed.start_weights(0, Lora::WITH_SPARE ? Lora::STAGES_BEFORE : min(Lora::STAGES_BEFORE, Feed::AHEAD));
    lora.find_first();
    fill_table<WARPS>(shared, p);
    lora.load_bank();
    feed.start_weights(Lora::STAGES_BEFORE, Feed::AHEAD + (Lora::WITH_SPARE ? Feed::SPARE : 0));
    wait_for_producer();
    lora.load_x();
    feed.template start_x<Lora::WITH_SPARE>();
    lora.template run<Feed>(reinterpret_cast<float*>(shared + TABLE_BYTES + Feed::LAST_STAGE));
}

// Per token, 8 * NT tokens a block. A warp has 16 * MT outputs and one 64-input half of every chunk.
template <int NT, int MT, int STAGES, class Lora>
__device__ __forceinline__ void partials(const PartialsParams& p, Lora& lora) {
    constexpr int WARPS = 2 * TILE_OUT / (16 * MT);
    extern __shared__ __align__(1024) u8 shared[];
    const u8* table = shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int half = warp & 1, out_warp = warp >> 1;
    const int group = lane >> 2, quad = lane & 3;
    Feed<NT * 8, WARPS, STAGES> feed(p, shared_address(shared) + TABLE_BYTES);
    start<WARPS>(feed, lora, p);

    float acc[MT][NT][4];
    float absmax[MT][2];
    auto clear = [&]() {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            absmax[m][0] = absmax[m][1] = 0.f;
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
        }
    };
    clear();
    const u32 lane4 = lane * 4;
    const int unit = out_warp * MT / 4, m0 = out_warp * MT & 3;  // 64 outputs; tiles of 16 inside them
    const u32 codes_at = (unit * 2 + half) * 2048 + m0 * 512 + lane * 16;
    const u32 absmax_at = CODE_BYTES + (unit * 2 + half) * 256 + m0 * 64 + group * 8;
    const int x_row = NT == 1 ? lane & 7 : (lane & 7) + (lane >> 4) * 8;
    const int x_piece = NT == 1 ? lane >> 3 : (lane >> 3) & 1;
    const u32 x_at = CHUNK_BYTES + half * (NT * 8 * 128) + x_row * 128 + ((x_piece ^ (lane & 7)) << 4);
    int slot = feed.first_slot();
    for (int index = 0; index < feed.count; ++index) {
        feed.template next<Lora::WITH_SPARE>();
        const u32 at = feed.at();
        uint4 words[MT];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            words[m] = load_shared16(at + codes_at + m * 512);
            const float2 now = load_shared8(at + absmax_at + m * 64);
            const float ratio[2] = {absmax[m][0] * reciprocal(now.x), absmax[m][1] * reciprocal(now.y)};
            absmax[m][0] = now.x, absmax[m][1] = now.y;
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][n][i] *= ratio[i / 2];
        }
        u32 two_steps[4];  // one token tile: one ldmatrix brings two steps of 16 inputs
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            u32 b[(NT + 1) / 2][4];  // more: one brings two token tiles
            if (NT > 1) {
#pragma unroll
                for (int n = 0; n < NT / 2; ++n) load_matrices(b[n], (at + x_at + n * 2048) ^ (step << 5));
            } else if (step % 2 == 0) {
                load_matrices(two_steps, (at + x_at) ^ (step << 5));
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const u32 word[4] = {words[m].x, words[m].y, words[m].z, words[m].w};
                u32 a[4];
                decode(a, word[step], table, lane4);
                if (NT == 1) {
                    mma(acc[m][0], a[0], a[1], a[2], a[3], two_steps[step % 2 * 2], two_steps[step % 2 * 2 + 1]);
                } else {
#pragma unroll
                    for (int n = 0; n < NT; ++n)
                        mma(acc[m][n], a[0], a[1], a[2], a[3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
        if (++feed.chunk_in_tile < p.split.chunks_per_tile && index + 1 < feed.count) {
            feed.release();
            continue;
        }

        // Leave this tile: back to true units, add the two halves of the inputs, store. Of the two warps that share
        // outputs each gives away half of them (through the stage that is now used up) and finishes the others.
        float* exchange = reinterpret_cast<float*>(shared + (at - shared_address(shared)));
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    acc[m][n][i] = __fmul_rn(acc[m][n][i], __fmul_rn(absmax[m][i / 2], 1.f / LEVEL_FACTOR));
        float* out = feed.slot(slot);
        const int first_out = feed.tile * TILE_OUT + out_warp * 16 * MT + half * 8 * MT + group;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            __syncthreads();
#pragma unroll
            for (int m = 0; m < MT / 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    exchange[(warp * (MT / 2) * 4 + m * 4 + i) * 32 + lane] =
                        half ? acc[m][n][i] : acc[m + MT / 2][n][i];
            __syncthreads();
#pragma unroll
            for (int m = 0; m < MT / 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float other = exchange[((warp ^ 1) * (MT / 2) * 4 + m * 4 + i) * 32 + lane];
                    const float own = half ? acc[m + MT / 2][n][i] : acc[m][n][i];
                    const int token = feed.first_token + n * 8 + quad * 2 + (i & 1);
                    const int column = first_out + m * 16 + i / 2 * 8;
                    if (token < p.num_tokens && column < p.out_features)
                        out[static_cast<long long>(token) * p.out_features + column] = own + other;
                }
        }
        clear();
        feed.chunk_in_tile = slot = 0;
        ++feed.tile;
        feed.before_release();
        feed.release();
    }
}

// For 8 tokens the compiler hears of more threads than there are: so the launch with LoRA keeps to 80 registers, as
// the one without, and a block of the kernel in front fits beside it.
#define PARTIALS(TOKENS, MT, STAGES, SHRINK_THREADS)                                   \
    extern "C" __global__ void __launch_bounds__(64 * TILE_OUT / (16 * MT), 1)         \
        nf4_partials_##TOKENS(const __grid_constant__ PartialsParams p) {              \
        NoShrink lora;                                                                 \
        partials<TOKENS / 8, MT, STAGES>(p, lora);                                     \
    }                                                                                  \
    extern "C" __global__ void __launch_bounds__(SHRINK_THREADS, 1)                    \
        nf4_partials_shrink_##TOKENS(const __grid_constant__ PartialsShrinkParams p) { \
        Shrink<2 * TILE_OUT / (16 * MT)> lora(p);                                      \
        partials<TOKENS / 8, MT, STAGES>(p.partials, lora);                            \
    }
#ifdef STAGES_8
PARTIALS(8, 2, STAGES_8, 736)
#endif
#ifdef STAGES_16
PARTIALS(16, 2, STAGES_16, 512)
#endif
#ifdef STAGES_32
PARTIALS(32, 2, STAGES_32, 512)
#endif
#ifdef STAGES_64
PARTIALS(64, 4, STAGES_64, 256)
#endif

#ifdef IS_HOPPER  // then Python has put wgmma<TOKENS>, wgmma_fence, wgmma_commit and wgmma_wait<PENDING> in front
template <int N>
__device__ __forceinline__ void hold(float (&values)[N]) {  // the compiler may not move their use across this
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// The same sums with Hopper's wgmma, of four warpgroups with 64 outputs each. With CHAINS = 2 the two halves of the
// inputs are kept apart, as the warps of `partials` do, so that the bits are the same.
template <int TOKENS, int CHAINS, int STAGES, class Lora>
__device__ __forceinline__ void partials_wgmma(const PartialsParams& p, Lora& lora) {
    extern __shared__ __align__(1024) u8 shared[];
    const u8* table = shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int group = lane >> 2, quad = lane & 3;
    Feed<TOKENS, 16, STAGES> feed(p, shared_address(shared) + TABLE_BYTES);
    start<16>(feed, lora, p);

    float acc[CHAINS][TOKENS / 2];
    float absmax[CHAINS][2];
    auto clear = [&]() {
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) {
            absmax[c][0] = absmax[c][1] = 0.f;
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) acc[c][i] = 0.f;
        }
    };
    clear();
    const u32 lane4 = lane * 4;
    const u32 codes_at = (warp >> 2) * 4096 + (warp & 3) * 512 + lane * 16;
    const u32 absmax_at = CODE_BYTES + (warp >> 2) * 512 + (warp & 3) * 64 + group * 8;
    // K-major, 128-byte swizzle, 1024 bytes from eight rows to the next
    constexpr u64 DESCRIPTOR = (1ull << 62) | (64ull << 32) | (1ull << 16);
    int slot = feed.first_slot();
    for (int index = 0; index < feed.count; ++index) {
        feed.template next<Lora::WITH_SPARE>();
        const u32 at = feed.at();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int c = half % CHAINS;
            const uint4 words = load_shared16(at + codes_at + half * 2048);
            const float2 now = load_shared8(at + absmax_at + half * 256);
            const float ratio[2] = {absmax[c][0] * reciprocal(now.x), absmax[c][1] * reciprocal(now.y)};
            absmax[c][0] = now.x, absmax[c][1] = now.y;
            u32 a[4][4];
            decode(a[0], words.x, table, lane4);
            decode(a[1], words.y, table, lane4);
            decode(a[2], words.z, table, lane4);
            decode(a[3], words.w, table, lane4);
            wgmma_wait<CHAINS - 1>();
            hold(acc[c]);
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) acc[c][i] *= ratio[i / 2 % 2];
            hold(acc[c]);
            wgmma_fence();
            const u64 b = DESCRIPTOR | ((at + CHUNK_BYTES + half * (TOKENS * 128)) >> 4);
#pragma unroll
            for (int step = 0; step < 4; ++step) wgmma<TOKENS>(acc[c], a[step], b + step * 2);
            wgmma_commit();
        }
        wgmma_wait<0>();
        feed.release();
        if (++feed.chunk_in_tile < p.split.chunks_per_tile && index + 1 < feed.count) continue;

        float* out = feed.slot(slot);
        const int first_out = feed.tile * TILE_OUT + warp * 16 + group;
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) hold(acc[c]);
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
            float sum = 0.f;
#pragma unroll
            for (int c = 0; c < CHAINS; ++c)
                sum += __fmul_rn(acc[c][i], __fmul_rn(absmax[c][i / 2 % 2], 1.f / LEVEL_FACTOR));
            const int token = feed.first_token + i / 4 * 8 + quad * 2 + (i & 1);
            const int column = first_out + i / 2 % 2 * 8;
            if (token < p.num_tokens && column < p.out_features)
                out[static_cast<long long>(token) * p.out_features + column] = sum;
        }
        clear();
        feed.chunk_in_tile = slot = 0;
        ++feed.tile;
    }
}

#define PARTIALS_WGMMA(TOKENS, CHAINS, STAGES)                                         \
    extern "C" __global__ void __launch_bounds__(512, 1)                               \
        nf4_partials_##TOKENS(const __grid_constant__ PartialsParams p) {              \
        NoShrink lora;                                                                 \
        partials_wgmma<TOKENS, CHAINS, STAGES>(p, lora);                               \
    }                                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 1)                               \
        nf4_partials_shrink_##TOKENS(const __grid_constant__ PartialsShrinkParams p) { \
        Shrink<16> lora(p);                                                            \
        partials_wgmma<TOKENS, CHAINS, STAGES>(p.partials, lora);                      \
    }
PARTIALS_WGMMA(16, 2, WGMMA_STAGES_16)
PARTIALS_WGMMA(32, 2, WGMMA_STAGES_32)
PARTIALS_WGMMA(64, 2, WGMMA_STAGES_64)
PARTIALS_WGMMA(128, 1, WGMMA_STAGES_128)
#endif

struct ReduceParams {
    u16* y;                  // [num_tokens, out] bf16
    const float* workspace;  // [slots, num_tokens, out]
    int num_tokens, out_features;
    SplitK split;
};

// y[t, n] = bf16(sum over slots, in order). One thread: four outputs of one token.
extern "C" __global__ void __launch_bounds__(256) nf4_reduce(const __grid_constant__ ReduceParams p) {
    let_dependents_start();
    const int column = (blockIdx.x * 256 + threadIdx.x) * 4, token = blockIdx.y;
    const int num_slots = p.split.num_slots(min(column, p.out_features - 1) / TILE_OUT);
    wait_for_producer();
    if (column >= p.out_features) return;
    const long long at = static_cast<long long>(token) * p.out_features + column;
    const long long slot_stride = static_cast<long long>(p.num_tokens) * p.out_features;
    float4 sum = *reinterpret_cast<const float4*>(p.workspace + at);
#pragma unroll 4
    for (int slot = 1; slot < num_slots; ++slot) {
        const float4 v = *reinterpret_cast<const float4*>(p.workspace + slot * slot_stride + at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    *reinterpret_cast<uint2*>(p.y + at) = make_uint2(to_bf16x2(sum.x, sum.y), to_bf16x2(sum.z, sum.w));
}

struct DequantizeParams {
    const u8* packed;
    u16* weight;  // [out, in] bf16
    int in_features, out_features, chunks_per_tile;
    float levels[16];
};

// weight[n, k] = bf16(level * absmax), rounded as bitsandbytes does. One warp: 64 outputs x 64 inputs, 32 outputs
// at a time, through shared memory so that rows are written in whole lines.
extern "C" __global__ void __launch_bounds__(256) nf4_dequantize(const __grid_constant__ DequantizeParams p) {
    constexpr int PITCH = 64 * 2 + 16;
    __shared__ __align__(16) u8 staging[8][32 * PITCH];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int unit = warp >> 1, half = warp & 1, group = lane >> 2, quad = lane & 3;
    const int tile = blockIdx.x / p.chunks_per_tile, chunk = blockIdx.x % p.chunks_per_tile;
    const u8* from = p.packed + static_cast<long long>(blockIdx.x) * CHUNK_BYTES;
    const float level = p.levels[lane & 15];
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int at = unit * 2 + half, m_tile = pair * 2 + m;
            const uint4 raw = *reinterpret_cast<const uint4*>(from + at * 2048 + m_tile * 512 + lane * 16);
            const float2 absmax =
                *reinterpret_cast<const float2*>(from + CODE_BYTES + at * 256 + m_tile * 64 + group * 8);
            const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int step = 0; step < 4; ++step)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const u32 byte = words[step] >> (r * 8);
                    const float scale = r & 1 ? absmax.y : absmax.x;
                    const float first = __shfl_sync(~0u, level, byte >> 4, 16) * scale;
                    const float second = __shfl_sync(~0u, level, byte, 16) * scale;
                    const int row = m * 16 + (r & 1) * 8 + group, column = step * 16 + (r >> 1) * 8 + quad * 2;
                    *reinterpret_cast<u32*>(staging[warp] + row * PITCH + column * 2) = to_bf16x2(first, second);
                }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = i * 4 + (lane >> 3), column = (lane & 7) * 8;
            const long long n = tile * TILE_OUT + unit * 64 + pair * 32 + row;
            const int k = chunk * CHUNK_IN + half * 64 + column;
            if (n < p.out_features && k < p.in_features)
                *reinterpret_cast<uint4*>(p.weight + n * p.in_features + k) =
                    *reinterpret_cast<const uint4*>(staging[warp] + row * PITCH + column * 2);
        }
        __syncwarp();
    }
}
