// How the weights and activations of nf4_linear.cu come into shared memory.

constexpr int SCALES = CHUNK_IN / GROUP_SIZE;  // of an output, in a chunk
constexpr int CODE_BYTES = TILE_OUT * CHUNK_IN / 2;
constexpr int CHUNK_BYTES = CODE_BYTES + TILE_OUT * SCALES * 4;
constexpr int TABLE_BYTES = 256 * TABLE_STRIDE;  // 128 bytes an entry, at a stride of 128 or 256; none: a stride of 0

struct PartialsParams {
#ifdef IS_HOPPER
    alignas(64) u8 x_map[128];  // tensor map of x, for boxes of 64 inputs x the block's tokens
#endif
    const u8* packed;       // [tiles, chunks along in, CHUNK_BYTES]
    const u16* x;           // [num_tokens, in] bf16
    float* workspace;       // [slots, num_tokens, out]
    long long x_stride;     // elements between rows of x
    const u8* next_packed;  // what the next linear of the model will read, or null
    int num_tokens, in_features, out_features, token_tiles;
    SplitK split, next_split;
    u32 levels[8];  // 16 x bf16(level * LEVEL_FACTOR), as bits
};

// Chunks on their way into shared memory. A stage holds the weights of one chunk as packed, then x as [2 halves of
// the inputs][tokens][64], with the eight 16-byte pieces of a row exchanged (piece ^ row % 8): ldmatrix and wgmma
// both read that without bank conflicts. AHEAD chunks are on their way at a time. Weights do not depend on the
// kernel in front: `start_weights` asks for them before it has ended, `start_x` for x after. The last stage is free
// until `next` was called SPARE times. WITH_SPARE, that many more chunks are asked for at the start.
template <int TOKENS, int STAGES>
struct Work {
    static constexpr int X_BYTES = TOKENS * CHUNK_IN * 2;
    static constexpr int STAGE_BYTES = CHUNK_BYTES + X_BYTES;
    static constexpr int LAST_STAGE = (STAGES - 1) * STAGE_BYTES;  // behind the ring's address
    const PartialsParams& p;
    const u32 ring;
    int worker, first_token, begin, count, tile, chunk_in_tile, load_chunk;
    int stage = 0, load_stage = 0, loaded = 0;

    __device__ __forceinline__ Work(const PartialsParams& params, u32 ring_address)
        : p(params), ring(ring_address) {
        worker = blockIdx.x / p.token_tiles;
        first_token = (blockIdx.x % p.token_tiles) * TOKENS;
        begin = p.split.first_chunk(worker);
        count = p.split.first_chunk(worker + 1) - begin;
        tile = begin / p.split.chunks_per_tile;
        chunk_in_tile = load_chunk = begin - tile * p.split.chunks_per_tile;
    }
    __device__ __forceinline__ int first_slot() const {
        return worker - p.split.worker_of(tile * p.split.chunks_per_tile);
    }
    __device__ __forceinline__ float* slot(int index) const {
        return p.workspace + static_cast<long long>(index) * p.num_tokens * p.out_features;
    }
    __device__ __forceinline__ const u8* weights(int index) const {
        return p.packed + static_cast<long long>(begin + index) * CHUNK_BYTES;
    }
    __device__ __forceinline__ void advance_load() {
        ++loaded;
        if (++load_stage == STAGES) load_stage = 0;
        if (++load_chunk == p.split.chunks_per_tile) load_chunk = 0;
    }
};

#ifdef IS_HOPPER
// One thread asks the copy engine for whole chunks; a stage has a barrier for "filled" and one for "read by all
// warps", so the warps need not keep step with each other.
template <int TOKENS, int WARPS, int STAGES>
struct Feed : Work<TOKENS, STAGES> {
    static constexpr int AHEAD = STAGES - 2, SPARE = 1;
    using Base = Work<TOKENS, STAGES>;
    const u32 barriers;
    int phase = 0;

    __device__ __forceinline__ Feed(const PartialsParams& params, u32 ring_address)
        : Base(params, ring_address), barriers(ring_address + STAGES * Base::STAGE_BYTES) {}

    __device__ __forceinline__ u32 filled(int stage) const { return barriers + stage * 8; }
    __device__ __forceinline__ u32 read(int stage) const { return barriers + (STAGES + stage) * 8; }
    __device__ __forceinline__ u32 at() const { return this->ring + this->stage * Base::STAGE_BYTES; }

    static __device__ __forceinline__ void wait(u32 barrier, u32 parity) {
        asm volatile(
            "{.reg .pred done;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;}" ::"r"(barrier),
            "r"(parity)
            : "memory");
    }
    __device__ __forceinline__ void load_weights(int index, int stage) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(filled(stage)),
                     "r"(Base::STAGE_BYTES)
                     : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                this->ring + stage * Base::STAGE_BYTES),
            "l"(this->weights(index)), "r"(CHUNK_BYTES), "r"(filled(stage))
            : "memory");
    }
    __device__ __forceinline__ void load_x(int stage) const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                "%3}], [%4];" ::"r"(this->ring + stage * Base::STAGE_BYTES + CHUNK_BYTES + half * (TOKENS * 128)),
                "l"(this->p.x_map), "r"(this->load_chunk * CHUNK_IN + half * 64), "r"(this->first_token),
                "r"(filled(stage))
                : "memory");
    }
    __device__ __forceinline__ void prepare() const {
        if (threadIdx.x != 0) return;
#pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(filled(i)) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(read(i)), "r"(WARPS) : "memory");
        }
        asm volatile("prefetch.tensormap [%0];" ::"l"(this->p.x_map) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __device__ __forceinline__ void start_weights(int first, int end) const {
        if (threadIdx.x != 0) return;
#pragma unroll
        for (int i = 0; i < AHEAD + SPARE; ++i)
            if (i >= first && i < end && i < this->count) load_weights(i, i);
    }
    template <bool WITH_SPARE>
    __device__ __forceinline__ void start_x() {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                if (i < this->count) {
                    load_x(i);
                    this->advance_load();
                }
            if (WITH_SPARE && AHEAD < this->count) load_x(AHEAD);
            if (this->loaded == this->count) prefetch_next_linear();
        }
        __syncthreads();  // barriers and table are there
    }
    // Wait for the next chunk, and ask for one more.
    template <bool WITH_SPARE>
    __device__ __forceinline__ void next() {
        if (threadIdx.x == 0 && this->loaded < this->count) {
            if (!WITH_SPARE || this->loaded != AHEAD) {
                // The stage was read STAGES chunks ago; the first time there is nothing to wait for.
                if (this->loaded >= STAGES) wait(read(this->load_stage), (this->loaded / STAGES - 1) & 1);
                load_weights(this->loaded, this->load_stage);
                load_x(this->load_stage);
            }
            this->advance_load();
            if (this->loaded == this->count) prefetch_next_linear();
        }
        __syncwarp();
        wait(filled(this->stage), phase);
        __syncwarp();
    }
    // Keep the memory busy until the next linear starts: bring its first chunks into the L2 cache.
    __device__ __forceinline__ void prefetch_next_linear() const {
        const PartialsParams& p = this->p;
        if (!p.next_packed || this->worker >= p.next_split.num_workers) return;
        const int first = p.next_split.first_chunk(this->worker);
        const int count = min(PREFETCH_CHUNKS, p.next_split.first_chunk(this->worker + 1) - first);
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                         p.next_packed + static_cast<long long>(first) * CHUNK_BYTES),
                     "r"(count * CHUNK_BYTES)
                     : "memory");
    }
    __device__ __forceinline__ void advance() {
        if (++this->stage == STAGES) this->stage = 0, phase ^= 1;
    }
    __device__ __forceinline__ void free(int stage) const {
        __syncwarp();
        if ((threadIdx.x & 31) == 0)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(read(stage)) : "memory");
    }
    __device__ __forceinline__ void release() {
        free(this->stage);
        advance();
    }
    // Between writing to a stage and releasing it to the copy engine.
    static __device__ __forceinline__ void before_release() {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
};
#else
// All threads copy, and meet once a chunk.
template <int TOKENS, int WARPS, int STAGES>
struct Feed : Work<TOKENS, STAGES> {
    static constexpr int AHEAD = STAGES - 1, SPARE = 0, THREADS = 32 * WARPS, X_PIECES = TOKENS * CHUNK_IN / 8;
    using Base = Work<TOKENS, STAGES>;

    __device__ __forceinline__ Feed(const PartialsParams& params, u32 ring_address) : Base(params, ring_address) {}

    __device__ __forceinline__ u32 at() const { return this->ring + this->stage * Base::STAGE_BYTES; }

    __device__ __forceinline__ void load_weights(int index, int stage) const {
        const u8* from = this->weights(index);
        const u32 to = this->ring + stage * Base::STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < (CHUNK_BYTES / 16 + THREADS - 1) / THREADS; ++i) {
            const int piece = threadIdx.x + i * THREADS;
            if (piece < CHUNK_BYTES / 16) copy16(to + piece * 16, from + piece * 16);
        }
    }
    __device__ __forceinline__ void load_x(int stage) const {
        const u32 to = this->ring + stage * Base::STAGE_BYTES + CHUNK_BYTES;
#pragma unroll
        for (int i = 0; i < (X_PIECES + THREADS - 1) / THREADS; ++i) {
            const int piece = threadIdx.x + i * THREADS, row = piece >> 4, column = piece & 15;
            if (X_PIECES % THREADS != 0 && piece >= X_PIECES) continue;
            const int k = this->load_chunk * CHUNK_IN + column * 8, token = this->first_token + row;
            const bool is_valid = token < this->p.num_tokens && k < this->p.in_features;
            const u16* from = is_valid ? this->p.x + token * this->p.x_stride + k : this->p.x;
            copy16(to + (column >> 3) * (TOKENS * 128) + row * 128 + (((column ^ row) & 7) << 4), from, is_valid);
        }
    }
    __device__ __forceinline__ void prepare() const {}
    __device__ __forceinline__ void start_weights(int first, int end) const {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (i >= first && i < end && i < this->count) load_weights(i, i);
    }
    template <bool WITH_SPARE>
    __device__ __forceinline__ void start_x() {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (i < this->count) load_x(i);
            this->advance_load();
            commit_copies();
        }
    }
    template <bool WITH_SPARE>
    __device__ __forceinline__ void next() {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (this->loaded < this->count) {
            load_weights(this->loaded, this->load_stage);
            load_x(this->load_stage);
        }
        this->advance_load();
        commit_copies();
    }
    __device__ __forceinline__ void release() {
        if (++this->stage == STAGES) this->stage = 0;
    }
    static __device__ __forceinline__ void before_release() {}
};
#endif
