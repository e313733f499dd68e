// Linear over 4-bit weights for few rows: y[t, n] = sum_k x[t, k] * level[code[n, k]] * scale[n, k / GROUP_SIZE].
//
// Each worker of the split (SplitK) adds what it has of a tile of 256 outputs into its own slot of the workspace,
// and `nf4_reduce` adds the slots in order. The cut depends on the shape of the weight and the number of workers
// alone, so a row's sums are formed in the same order whatever the number of rows is.
//
// The weights are the A operand of the matrix instruction (tokens are its n side). One packed byte is two weights
// next to each other along the inputs; for NF4 a table in shared memory turns it into a pair of bf16 levels, replicated
// over the 32 banks, so that lanes never collide. With INTEGER_LEVELS (code - 8) the pair is computed. The accumulator
// is kept in units of the current group's scale (acc *= previous / current), so no weight is rounded after its level
// and no second accumulator is needed.
//
// A tile's inputs are summed in CHAINS runs: in one, or in the two halves of every chunk, which are added at the end.
// All kernels for up to 64 tokens do the same, so that a row's bits do not depend on which of them ran.

#if INTEGER_LEVELS
template <int WARPS>
__device__ __forceinline__ void fill_table(u8*, const PartialsParams&) {}

// A pair is nibbles r and r + 4 of the word. In the mantissa of 128 they make 128 + code; less 136 that is exact.
__device__ __forceinline__ void decode(u32 (&a)[4], u32 word, const u8*, u32) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = minus_136(((word >> (4 * r)) & 0x000f000fu) | 0x43004300u);
}
#else
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
#endif

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

// A warp of the mma.sync kernels has 16 * MT outputs, and with CHAINS = 2 one half of every chunk's inputs.
constexpr int GROUP_STEPS = GROUP_SIZE / 16;  // of 16 inputs, with one scale
constexpr int SCALE_BYTES = 256;              // of 64 outputs, for a group

// 8 * NT tokens a block.
template <int NT, int MT, int STAGES, class Lora>
__device__ __forceinline__ void partials(const PartialsParams& p, Lora& lora) {
    constexpr int WARPS = CHAINS * TILE_OUT / (16 * MT), STEPS = 8 / CHAINS;  // of 16 inputs of a chunk
    extern __shared__ __align__(1024) u8 shared[];
    const u8* table = shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int own_half = CHAINS == 2 ? warp & 1 : 0, out_warp = warp / CHAINS;
    const int group = lane >> 2, quad = lane & 3;
    Feed<NT * 8, WARPS, STAGES> feed(p, shared_address(shared) + TABLE_BYTES);
    start<WARPS>(feed, lora, p);

    float acc[MT][NT][4];
    float scale[MT][2];
    auto clear = [&]() {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            scale[m][0] = scale[m][1] = 0.f;
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
        }
    };
    clear();
    const u32 lane4 = lane * 4;
    const int unit = out_warp * MT / 4, m0 = out_warp * MT & 3;  // 64 outputs; tiles of 16 inside them
    const u32 codes_at = (unit * 2 + own_half) * 2048 + m0 * 512 + lane * 16;
    const u32 scales_at =
        CODE_BYTES + (unit * SCALES + own_half * (SCALES / 2)) * SCALE_BYTES + m0 * 64 + group * 8;
    const int x_row = NT == 1 ? lane & 7 : (lane & 7) + (lane >> 4) * 8;
    const int x_piece = NT == 1 ? lane >> 3 : (lane >> 3) & 1;
    const u32 x_at = CHUNK_BYTES + own_half * (NT * 8 * 128) + x_row * 128 + ((x_piece ^ (lane & 7)) << 4);
    int slot = feed.first_slot();
    for (int index = 0; index < feed.count; ++index) {
        feed.template next<Lora::WITH_SPARE>();
        const u32 at = feed.at();
        uint4 words[MT];
        u32 two_steps[4];  // one token tile: one ldmatrix brings two steps of 16 inputs
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int half = step / 4;  // past the warp's first
            if (step % 4 == 0) {
#pragma unroll
                for (int m = 0; m < MT; ++m) words[m] = load_shared16(at + codes_at + half * 2048 + m * 512);
            }
            if (step % GROUP_STEPS == 0) {
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    const float2 now = load_shared8(at + scales_at + step / GROUP_STEPS * SCALE_BYTES + m * 64);
                    const float ratio[2] = {scale[m][0] * reciprocal(now.x), scale[m][1] * reciprocal(now.y)};
                    scale[m][0] = now.x, scale[m][1] = now.y;
#pragma unroll
                    for (int n = 0; n < NT; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) acc[m][n][i] *= ratio[i / 2];
                }
            }
            const u32 x_half = at + x_at + half * (NT * 8 * 128);
            u32 b[(NT + 1) / 2][4];  // more: one brings two token tiles
            if (NT > 1) {
#pragma unroll
                for (int n = 0; n < NT / 2; ++n) load_matrices(b[n], (x_half + n * 2048) ^ (step % 4 << 5));
            } else if (step % 2 == 0) {
                load_matrices(two_steps, x_half ^ (step % 4 << 5));
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                const u32 word[4] = {words[m].x, words[m].y, words[m].z, words[m].w};
                u32 a[4];
                decode(a, word[step % 4], table, lane4);
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

        // Leave this tile: back to true units, and store.
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    acc[m][n][i] = __fmul_rn(acc[m][n][i], __fmul_rn(scale[m][i / 2], 1.f / LEVEL_FACTOR));
        float* out = feed.slot(slot);
        const int first_out = feed.tile * TILE_OUT + out_warp * 16 * MT + group;
        auto store = [&](int m, int n, int i, float sum) {
            const int token = feed.first_token + n * 8 + quad * 2 + (i & 1);
            const int column = first_out + m * 16 + i / 2 * 8;
            if (token < p.num_tokens && column < p.out_features)
                out[static_cast<long long>(token) * p.out_features + column] = sum;
        };
        if (CHAINS == 1) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) store(m, n, i, acc[m][n][i]);
        } else {
            // Of the two warps that share outputs each gives away half of them (through the stage that is now used up),
            // adds the other's half of the inputs to the rest and stores these.
            float* exchange = reinterpret_cast<float*>(shared + (at - shared_address(shared)));
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                __syncthreads();
#pragma unroll
                for (int m = 0; m < MT / 2; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        exchange[(warp * (MT / 2) * 4 + m * 4 + i) * 32 + lane] =
                            own_half ? acc[m][n][i] : acc[m + MT / 2][n][i];
                __syncthreads();
#pragma unroll
                for (int m = 0; m < MT / 2; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float other = exchange[((warp ^ 1) * (MT / 2) * 4 + m * 4 + i) * 32 + lane];
                        const float own = own_half ? acc[m + MT / 2][n][i] : acc[m][n][i];
                        store(own_half * (MT / 2) + m, n, i, own + other);
                    }
            }
            feed.before_release();
        }
        clear();
        feed.chunk_in_tile = slot = 0;
        ++feed.tile;
        feed.release();
    }
}

// For 8 tokens the compiler hears of more threads than there are: so the launch with LoRA keeps to 80 registers, as
// the one without, and a block of the kernel in front fits beside it.
#define PARTIALS(TOKENS, MT, STAGES, SHRINK_THREADS)                                   \
    extern "C" __global__ void __launch_bounds__(CHAINS * 2 * TILE_OUT / (MT), 1)      \
        nf4_partials_##TOKENS(const __grid_constant__ PartialsParams p) {              \
        NoShrink lora;                                                                 \
        partials<TOKENS / 8, MT, STAGES>(p, lora);                                     \
    }                                                                                  \
    extern "C" __global__ void __launch_bounds__(SHRINK_THREADS, 1)                    \
        nf4_partials_shrink_##TOKENS(const __grid_constant__ PartialsShrinkParams p) { \
        Shrink<CHAINS * TILE_OUT / (16 * (MT))> lora(p);                               \
        partials<TOKENS / 8, MT, STAGES>(p.partials, lora);                            \
    }
#ifdef STAGES_8
PARTIALS(8, CHAINS * 16 / WARPS_8, STAGES_8, WARPS_8 == 16 ? 736 : 368)
#endif
#ifdef STAGES_16
PARTIALS(16, CHAINS, STAGES_16, 512)
#endif
#ifdef STAGES_32
PARTIALS(32, CHAINS, STAGES_32, 512)
#endif
#ifdef STAGES_64
PARTIALS(64, 2 * CHAINS, STAGES_64, 256)
#endif

#ifdef IS_HOPPER  // then Python has put wgmma<TOKENS>, wgmma_fence, wgmma_commit and wgmma_wait<PENDING> in front
template <int N>
__device__ __forceinline__ void hold(float (&values)[N]) {  // the compiler may not move their use across this
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// The same sums with Hopper's wgmma, of four warpgroups with 64 outputs each.
template <int TOKENS, int RUNS, int STAGES, class Lora>
__device__ __forceinline__ void partials_wgmma(const PartialsParams& p, Lora& lora) {
    // A chunk is multiplied in parts that lie in one half and have one scale. With two runs their parts take turns, and
    // one is multiplied while the other's next weights are decoded.
    constexpr int PARTS = SCALES < 2 ? 2 : SCALES, STEPS = 8 / PARTS;
    extern __shared__ __align__(1024) u8 shared[];
    const u8* table = shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int group = lane >> 2, quad = lane & 3;
    Feed<TOKENS, 16, STAGES> feed(p, shared_address(shared) + TABLE_BYTES);
    start<16>(feed, lora, p);

    float acc[RUNS][TOKENS / 2];
    float scale[RUNS][2];
    auto clear = [&]() {
#pragma unroll
        for (int c = 0; c < RUNS; ++c) {
            scale[c][0] = scale[c][1] = 0.f;
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) acc[c][i] = 0.f;
        }
    };
    clear();
    const u32 lane4 = lane * 4;
    const u32 codes_at = (warp >> 2) * 4096 + (warp & 3) * 512 + lane * 16;
    const u32 scales_at = CODE_BYTES + (warp >> 2) * (SCALES * SCALE_BYTES) + (warp & 3) * 64 + group * 8;
    // K-major, 128-byte swizzle, 1024 bytes from eight rows to the next
    constexpr u64 DESCRIPTOR = (1ull << 62) | (64ull << 32) | (1ull << 16);
    int slot = feed.first_slot();
    int used = -1;  // a stage that products still under way may read
    for (int index = 0; index < feed.count; ++index) {
        feed.template next<Lora::WITH_SPARE>();
        const u32 at = feed.at();
        u32 words[2][4];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int half = RUNS == 2 ? part % 2 : part / (PARTS / 2);
            const int first = (RUNS == 2 ? part / 2 : part % (PARTS / 2)) * STEPS;  // in the half
            const int c = half % RUNS, step_in_chunk = half * 4 + first;
            if (first == 0) {
                const uint4 v = load_shared16(at + codes_at + half * 2048);
                words[half][0] = v.x, words[half][1] = v.y, words[half][2] = v.z, words[half][3] = v.w;
            }
            u32 a[STEPS][4];
            if (RUNS == 2 || step_in_chunk % GROUP_STEPS == 0) {
                const float2 now = load_shared8(at + scales_at + step_in_chunk / GROUP_STEPS * SCALE_BYTES);
                const float ratio[2] = {scale[c][0] * reciprocal(now.x), scale[c][1] * reciprocal(now.y)};
                scale[c][0] = now.x, scale[c][1] = now.y;
#pragma unroll
                for (int step = 0; step < STEPS; ++step) decode(a[step], words[half][first + step], table, lane4);
                wgmma_wait<RUNS - 1>();
                if (LATE_RELEASE && part == RUNS - 1 && used >= 0) feed.free(used);
                hold(acc[c]);
#pragma unroll
                for (int i = 0; i < TOKENS / 2; ++i) acc[c][i] *= ratio[i / 2 % 2];
                hold(acc[c]);
            } else {  // in the units of the part before
#pragma unroll
                for (int step = 0; step < STEPS; ++step) decode(a[step], words[half][first + step], table, lane4);
            }
            wgmma_fence();
            const u64 b = DESCRIPTOR | ((at + CHUNK_BYTES + half * (TOKENS * 128)) >> 4);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) wgmma<TOKENS>(acc[c], a[step], b + (first + step) * 2);
            wgmma_commit();
        }
        const bool leaves = ++feed.chunk_in_tile == p.split.chunks_per_tile || index + 1 == feed.count;
        if (LATE_RELEASE && !leaves) {
            used = feed.stage;
            feed.advance();
            continue;
        }
        wgmma_wait<0>();
        used = -1;
        feed.release();
        if (!leaves) continue;

        float* out = feed.slot(slot);
        const int first_out = feed.tile * TILE_OUT + warp * 16 + group;
#pragma unroll
        for (int c = 0; c < RUNS; ++c) hold(acc[c]);
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
            float sum = 0.f;
#pragma unroll
            for (int c = 0; c < RUNS; ++c)
                sum += __fmul_rn(acc[c][i], __fmul_rn(scale[c][i / 2 % 2], 1.f / LEVEL_FACTOR));
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

#define PARTIALS_WGMMA(TOKENS, RUNS, STAGES)                                           \
    extern "C" __global__ void __launch_bounds__(512, 1)                               \
        nf4_partials_##TOKENS(const __grid_constant__ PartialsParams p) {              \
        NoShrink lora;                                                                 \
        partials_wgmma<TOKENS, RUNS, STAGES>(p, lora);                                 \
    }                                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 1)                               \
        nf4_partials_shrink_##TOKENS(const __grid_constant__ PartialsShrinkParams p) { \
        Shrink<16> lora(p);                                                            \
        partials_wgmma<TOKENS, RUNS, STAGES>(p.partials, lora);                        \
    }
#ifdef WGMMA_STAGES_8
PARTIALS_WGMMA(8, CHAINS, WGMMA_STAGES_8)
#endif
PARTIALS_WGMMA(16, CHAINS, WGMMA_STAGES_16)
PARTIALS_WGMMA(32, CHAINS, WGMMA_STAGES_32)
PARTIALS_WGMMA(64, CHAINS, WGMMA_STAGES_64)
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

// weight[n, k] = bf16(level * scale), rounded once, as bitsandbytes does. One warp: 64 outputs x 64 inputs, 32 outputs
// at a time, through shared memory so that rows are written in whole lines.
extern "C" __global__ void __launch_bounds__(256) nf4_dequantize(const __grid_constant__ DequantizeParams p) {
    constexpr int PITCH = 64 * 2 + 16;
    __shared__ __align__(16) u8 staging[8][32 * PITCH];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int unit = warp >> 1, half = warp & 1, group = lane >> 2, quad = lane & 3;
    const int tile = blockIdx.x / p.chunks_per_tile, chunk = blockIdx.x % p.chunks_per_tile;
    const u8* from = p.packed + static_cast<long long>(blockIdx.x) * CHUNK_BYTES;
#if !INTEGER_LEVELS
    const float level = p.levels[lane & 15];
#endif
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int at = unit * 2 + half, m_tile = pair * 2 + m;
            const uint4 raw = *reinterpret_cast<const uint4*>(from + at * 2048 + m_tile * 512 + lane * 16);
            const u8* scales = from + CODE_BYTES + unit * (SCALES * SCALE_BYTES) + m_tile * 64 + group * 8;
            const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                const float2 two_rows = *reinterpret_cast<const float2*>(
                    scales + (half * 4 + step) / GROUP_STEPS * SCALE_BYTES);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const float scale = r & 1 ? two_rows.y : two_rows.x;
#if INTEGER_LEVELS
                    const float first = (static_cast<int>(words[step] >> (r * 4) & 15) - 8) * scale;
                    const float second = (static_cast<int>(words[step] >> (r * 4 + 16) & 15) - 8) * scale;
#else
                    const u32 byte = words[step] >> (r * 8);
                    const float first = __shfl_sync(~0u, level, byte >> 4, 16) * scale;
                    const float second = __shfl_sync(~0u, level, byte, 16) * scale;
#endif
                    const int row = m * 16 + (r & 1) * 8 + group, column = step * 16 + (r >> 1) * 8 + quad * 2;
                    *reinterpret_cast<u32*>(staging[warp] + row * PITCH + column * 2) = to_bf16x2(first, second);
                }
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
