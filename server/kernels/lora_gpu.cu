// LoRA for a step whose tokens use different adapters, on tensor cores.
//
// An adapter's rank rows are in pages of eight rows of the banks. The host groups the step's tokens by adapter and
// writes down everything a block has to know in one record (LoraGpuStep), so that its loads start at once. Counts are
// read on the device: a captured graph stays valid when the step changes. No sum depends on which other
// tokens are in the step.

constexpr int PAGE_ROWS = 8;

struct Step {
    const int* header;       // shrink items; tiles with an adapter, all tiles: small ones, then large ones
    const int4* items;       // page, second page or -1; first position in token_order; tokens | page's place << 16
    const int* small_tiles;  // records, see below: up to 4 tokens
    const int* large_tiles;  // up to 64 tokens
    const int* token_order;  // tokens by adapter, those without one last
    const int* page_table;   // [adapters, max_pages]
    int max_pages, num_tokens;
};

// A tile's record: 4 tokens (small tiles); adapter or -1, pages, first page, second page; bank row with DoRA's gain - 1 or
// -1, tokens in the tile, first position in token_order, 0.
constexpr int RECORD = 12;

struct ShrinkParams {
    Step step;
    const u16* x;     // [num_tokens, in] bf16
    const u16* bank;  // [rows, sublinears, in] bf16
    float* h;         // [slices, num_tokens, sublinears, max_pages * 8]
    long long x_stride, row_stride, sublinear_stride;  // in elements
    int in_features, slice_in;
};

// h[slice, t, s, j] = sum of x[t, k] * bank[row j of t's adapter, s, k] over the slice's k. One block: one item (up to two
// pages of one adapter and 8 * NT of its tokens), one sublinear, one slice. The eight warps take blocks of 64 inputs
// in turn. The matrix instruction has the 16 bank rows on its m side and 8 tokens on its n side.
//
// Within 32 inputs a lane loads 16 bytes, eight inputs in a row, of its rows of the bank and of x: the order in which
// the instruction meets the inputs is not theirs in memory, but it is the same on both sides.
template <int NT, int PIECES>
__device__ __forceinline__ void shrink(const ShrinkParams& p) {
    constexpr int RANKS = 2 * PAGE_ROWS, TOKENS = NT * 8;
    __shared__ float sums[8][TOKENS][RANKS + 1];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int sublinear = blockIdx.y, slice = blockIdx.z;
    const int begin = slice * p.slice_in, span = min(p.slice_in, p.in_features - begin);
    const int width = step.max_pages * PAGE_ROWS;
    bool has_waited = false;
    let_dependents_start();
    int4 item = step.items[blockIdx.x];
    const int num_items = step.header[0];
    for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
        if (index != blockIdx.x) item = step.items[index];
        const int count = item.w & 0xffff, place = item.w >> 16;
        const u16* rows[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int page = r ? item.y : item.x;
            rows[r] = nullptr;
            if (page >= 0)
                rows[r] = p.bank + (page * PAGE_ROWS + group) * p.row_stride + sublinear * p.sublinear_stride + begin;
        }
        const u16* tokens[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            tokens[n] = nullptr;
            if (n * 8 + group < count)
                tokens[n] = p.x + step.token_order[item.z + n * 8 + group] * p.x_stride + begin;
        }
        int out_token[(TOKENS * RANKS + 255) / 256];
#pragma unroll
        for (int i = 0; i < (TOKENS * RANKS + 255) / 256; ++i) {
            const int position = (threadIdx.x + i * 256) / RANKS;
            out_token[i] = position < count ? step.token_order[item.z + position] : -1;
        }
        float acc[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;

        for (int first = 0; (first / 2 * 8 + warp) * 64 < span; first += PIECES) {
            int k[PIECES];
            uint4 a[PIECES][2], x[PIECES][NT];
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
                k[j] = ((first + j) / 2 * 8 + warp) * 64 + (first + j) % 2 * 32 + quad * 8;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    a[j][r] = make_uint4(0, 0, 0, 0);
                    if (k[j] < span && rows[r]) a[j][r] = __ldg(reinterpret_cast<const uint4*>(rows[r] + k[j]));
                }
            }
            if (!has_waited) wait_for_producer();  // the bank was there before the step began; x was not
            has_waited = true;
#pragma unroll
            for (int j = 0; j < PIECES; ++j)
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    x[j][n] = make_uint4(0, 0, 0, 0);
                    if (k[j] < span && tokens[n]) x[j][n] = *reinterpret_cast<const uint4*>(tokens[n] + k[j]);
                }
#pragma unroll
            for (int j = 0; j < PIECES; ++j)
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    mma(acc[n], a[j][0].x, a[j][1].x, a[j][0].y, a[j][1].y, x[j][n].x, x[j][n].y);
                    mma(acc[n], a[j][0].z, a[j][1].z, a[j][0].w, a[j][1].w, x[j][n].z, x[j][n].w);
                }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][n * 8 + quad * 2 + i % 2][i / 2 * 8 + group] = acc[n][i];
        if (!has_waited) wait_for_producer();
        has_waited = true;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < (TOKENS * RANKS + 255) / 256; ++i) {
            const int position = (threadIdx.x + i * 256) / RANKS, rank = threadIdx.x % RANKS;
            if (out_token[i] < 0 || (rank >= PAGE_ROWS && item.y < 0)) continue;
            float sum = sums[0][position][rank];
#pragma unroll
            for (int w = 1; w < 8; ++w) sum += sums[w][position][rank];
            p.h[((slice * static_cast<long long>(step.num_tokens) + out_token[i]) * gridDim.y + sublinear) * width +
                place * PAGE_ROWS + rank] = sum;
        }
        __syncthreads();
    }
    if (!has_waited) wait_for_producer();
}

extern "C" __global__ void __launch_bounds__(256, 3) lora_shrink_small(const __grid_constant__ ShrinkParams p) {
    shrink<1, 4>(p);
}
extern "C" __global__ void __launch_bounds__(256, 2) lora_shrink_large(const __grid_constant__ ShrinkParams p) {
    shrink<4, 2>(p);
}

struct ExpandParams {
    Step step;               // header is null: no adapters in this step
    const float* h;          // [slices, num_tokens, sublinears, max_pages * 8]
    const u16* bank;         // [rows, out] bf16: row j of an adapter is B's column j
    const float* workspace;  // [slots, num_tokens, out] fp32, where the linear's split-K sums are still apart
    const u16* linear;       // [num_tokens, out] bf16, where they are not; may be y
    const u16* residual;     // [num_tokens, out] bf16, or null
    u16* y;                  // [num_tokens, out] bf16, or [num_tokens, out / 2] with SILU
    long long bank_stride;   // in elements
    int out_features, num_sublinears, num_slices;
    int sublinear_end[4];    // first output after each
    SplitK split;
};

// y[t, c] = linear[t, c] + sum of h[t, s(c), j] * bank[row j of t's adapter, c], then y += y * gain[c] (DoRA), then
// the residual. With SILU: y[t, c] = silu(gate) * up of outputs c and c + out / 2.
//
// The matrix instruction has 16 outputs on its m side, 8 tokens on its n side and the ranks of two pages inside. A lane
// loads eight outputs in a row of four rows of the bank, and those are its outputs: instruction i has
// output 8 * g + 2 * i as row g and the one after it as row g + 8.
struct BankRows {
    uint4 row[2][2];  // [page][rank rows 2 * quad and 2 * quad + 1]
};

__device__ __forceinline__ BankRows load_bank(const ExpandParams& p, int page0, int page1, int lane_column, bool is_inside) {
    const int quad = threadIdx.x & 3;
    BankRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int page = half ? page1 : page0;
            rows.row[half][r] = make_uint4(0, 0, 0, 0);
            if (is_inside && page >= 0)
                rows.row[half][r] = __ldg(reinterpret_cast<const uint4*>(
                    p.bank + (page * PAGE_ROWS + quad * 2 + r) * p.bank_stride + lane_column));
        }
    return rows;
}

// acc[n][i][..] += outputs x ranks x tokens; `is_mine`: the lane's outputs belong to the sublinear of `h`.
template <int NT>
__device__ __forceinline__ void add_product(float (&acc)[NT][4][4], const BankRows& bank, const u32 (&h)[NT][2], bool is_mine) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 a[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 r0 = bank.row[half][0], r1 = bank.row[half][1];
            const u32 low[4] = {r0.x, r0.y, r0.z, r0.w}, high[4] = {r1.x, r1.y, r1.z, r1.w};
            a[half][0] = is_mine ? __byte_perm(low[i], high[i], 0x5410) : 0;
            a[half][1] = is_mine ? __byte_perm(low[i], high[i], 0x7632) : 0;
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) mma(acc[n][i], a[0][0], a[0][1], a[1][0], a[1][1], h[n][0], h[n][1]);
    }
}

struct Sublinears {  // those that 64 outputs from `from` on lie in, and the one of the lane's eight
    int first = 0, last = 0, mine = 0;

    __device__ __forceinline__ Sublinears(const ExpandParams& p, int from, int num_outputs) {
        const int group = (threadIdx.x & 31) >> 2;
#pragma unroll
        for (int s = 0; s < 3; ++s)
            if (s + 1 < p.num_sublinears) {
                mine += from + group * 8 >= p.sublinear_end[s];
                first += from >= p.sublinear_end[s];
                last += from + num_outputs - 1 >= p.sublinear_end[s];
            }
    }
};

__device__ __forceinline__ float silu(float x) {
    return x / (1.f + __expf(-x));
}

struct Record {
    int4 tokens, one, two;
};

// Up to 4 tokens of one adapter, or of none. One warp: 64 outputs (or 64 gates and their ups); a block's four warps are
// side by side. All that a warp reads is asked for before any of it is used.
template <bool FROM_WORKSPACE, bool SILU>
__device__ __forceinline__ void expand_small(const ExpandParams& p) {
    constexpr int TILE = 4, UNITS = TILE / 2, PARTS = SILU ? 2 : 1, PITCH = 68, SLOTS = SILU ? 3 : 5, SLICES = 4;
    __shared__ __align__(16) float staging[4][PARTS][TILE * PITCH];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int column = (blockIdx.x * 4 + warp) * 64, columns = p.out_features / PARTS;
    const int my_column = column + (lane & 15) * 4;  // at the end: four outputs of each part, of every other token
    const bool has_step = step.header != nullptr;
    const int width = step.max_pages * PAGE_ROWS;
    const long long slot_stride = static_cast<long long>(step.num_tokens) * p.out_features;
    const long long slice_stride = static_cast<long long>(step.num_tokens) * p.num_sublinears * width;
    const bool writes_all = FROM_WORKSPACE || SILU || p.residual != nullptr;  // tokens without an adapter too
    let_dependents_start();
    auto record_of = [&](int index) {
        const int4* from = reinterpret_cast<const int4*>(step.small_tiles + index * RECORD);
        return Record{from[0], from[1], from[2]};
    };
    Record next = {make_int4(0, 0, 0, 0), make_int4(-1, 0, 0, 0), make_int4(-1, 0, 0, 0)};
    if (has_step) next = record_of(blockIdx.y);
    const int num_tiles = has_step ? step.header[writes_all ? 2 : 1] : (step.num_tokens + TILE - 1) / TILE;
    int num_slots[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
        num_slots[part] = FROM_WORKSPACE ? p.split.num_slots(min(column + part * columns, p.out_features - 1) / TILE_OUT) : 0;
    bool has_waited = false;

    for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
        Record now = next;
        if (!has_step) {
            const int first = index * TILE;
            now.tokens = make_int4(first, first + 1, first + 2, first + 3);
            now.two.y = min(TILE, step.num_tokens - first);
        } else if (index + gridDim.y < num_tiles) {
            next = record_of(index + gridDim.y);
        }
        if (column >= columns) continue;  // whole warps
        const int adapter = now.one.x, num_pages = now.one.y, gain_row = now.two.x, count = now.two.y;
        int my_token[UNITS] = {lane < 16 ? now.tokens.x : now.tokens.y, lane < 16 ? now.tokens.z : now.tokens.w};
#pragma unroll
        for (int u = 0; u < UNITS; ++u)
            if (u * 2 + (lane >> 4) >= count || my_column >= columns) my_token[u] = -1;
        const int low_token = group & 1 ? now.tokens.y : now.tokens.x, high_token = group & 1 ? now.tokens.w : now.tokens.z;
        const int row_token = group < count ? (group & 2 ? high_token : low_token) : -1;

        const bool is_inside = column + group * 8 < columns && num_pages > 0;
        BankRows bank[PARTS];  // it was there before the step began
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            bank[part] = load_bank(p, now.one.z, now.one.w, column + part * columns + group * 8, is_inside);
        if (!has_waited) wait_for_producer();
        has_waited = true;

        // The linear alone: its first slots, or all of it.
        float4 slots[FROM_WORKSPACE ? PARTS : 1][UNITS][FROM_WORKSPACE ? SLOTS : 1];
        uint2 linear[PARTS][UNITS], residual[UNITS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                const long long at = static_cast<long long>(my_token[u]) * p.out_features + my_column + part * columns;
                linear[part][u] = make_uint2(0, 0);
                if (!FROM_WORKSPACE) {
                    if (my_token[u] >= 0) linear[part][u] = *reinterpret_cast<const uint2*>(p.linear + at);
                } else {
#pragma unroll
                    for (int s = 0; s < SLOTS; ++s) {
                        slots[part][u][s] = make_float4(0.f, 0.f, 0.f, 0.f);
                        if (my_token[u] >= 0 && s < num_slots[part])
                            slots[part][u][s] = *reinterpret_cast<const float4*>(p.workspace + s * slot_stride + at);
                    }
                }
            }
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            residual[u] = make_uint2(0, 0);
            if (p.residual && my_token[u] >= 0)
                residual[u] = *reinterpret_cast<const uint2*>(
                    p.residual + static_cast<long long>(my_token[u]) * columns + my_column);
        }

        // What the adapter adds, through shared memory to the lanes that add it.
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (num_pages == 0) continue;
            const int from = column + part * columns;
            const Sublinears sublinears(p, from, min(64, columns - column));
            float acc[1][4][4] = {};
            for (int place = 0; place < num_pages; place += 2) {
                const bool has_second = place + 1 < num_pages;
                if (place > 0) {
                    const int* pages = step.page_table + adapter * step.max_pages + place;
                    bank[part] = load_bank(p, pages[0], has_second ? pages[1] : -1, from + group * 8, is_inside);
                }
                for (int s = sublinears.first; s <= sublinears.last; ++s) {
                    const long long at =
                        (static_cast<long long>(row_token) * p.num_sublinears + s) * width + place * PAGE_ROWS + quad * 2;
                    float2 sum[2] = {make_float2(0.f, 0.f), make_float2(0.f, 0.f)};
                    for (int slice = 0; slice < p.num_slices; slice += SLICES) {
                        float2 v[SLICES][2];
#pragma unroll
                        for (int i = 0; i < SLICES; ++i)
#pragma unroll
                            for (int half = 0; half < 2; ++half) {
                                v[i][half] = make_float2(0.f, 0.f);
                                if (row_token >= 0 && slice + i < p.num_slices && (half == 0 || has_second))
                                    v[i][half] = *reinterpret_cast<const float2*>(
                                        p.h + (slice + i) * slice_stride + at + half * PAGE_ROWS);
                            }
#pragma unroll
                        for (int i = 0; i < SLICES; ++i)
#pragma unroll
                            for (int half = 0; half < 2; ++half)
                                sum[half].x += v[i][half].x, sum[half].y += v[i][half].y;
                    }
                    const u32 h[1][2] = {{to_bf16x2(sum[0].x, sum[0].y), to_bf16x2(sum[1].x, sum[1].y)}};
                    add_product<1>(acc, bank[part], h, sublinears.mine == s);
                }
            }
            if (quad < 2) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    float* to = staging[warp][part] + (quad * 2 + t) * PITCH + group * 8;
                    *reinterpret_cast<float4*>(to) = make_float4(acc[0][0][t], acc[0][0][t + 2], acc[0][1][t], acc[0][1][t + 2]);
                    *reinterpret_cast<float4*>(to + 4) =
                        make_float4(acc[0][2][t], acc[0][2][t + 2], acc[0][3][t], acc[0][3][t + 2]);
                }
            }
        }
        __syncwarp();

#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            if (my_token[u] < 0) continue;
            const int position = u * 2 + (lane >> 4);
            float v[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int c = my_column + part * columns;
                float4 own;
                if (FROM_WORKSPACE) {
                    own = slots[part][u][0];
#pragma unroll
                    for (int s = 1; s < SLOTS; ++s) {  // absent ones are zeros
                        own.x += slots[part][u][s].x, own.y += slots[part][u][s].y;
                        own.z += slots[part][u][s].z, own.w += slots[part][u][s].w;
                    }
                    const float* at = p.workspace + static_cast<long long>(my_token[u]) * p.out_features + c;
#pragma unroll 5
                    for (int s = SLOTS; s < num_slots[part]; ++s) {
                        const float4 more = *reinterpret_cast<const float4*>(at + s * slot_stride);
                        own.x += more.x, own.y += more.y, own.z += more.z, own.w += more.w;
                    }
                } else {
                    const uint2 l = linear[part][u];
                    own = make_float4(low_bf16(l.x), high_bf16(l.x), low_bf16(l.y), high_bf16(l.y));
                }
                v[part][0] = own.x, v[part][1] = own.y, v[part][2] = own.z, v[part][3] = own.w;
                if (num_pages > 0) {
                    const float4 delta =
                        *reinterpret_cast<const float4*>(staging[warp][part] + position * PITCH + (lane & 15) * 4);
                    v[part][0] += delta.x, v[part][1] += delta.y, v[part][2] += delta.z, v[part][3] += delta.w;
                }
                if (gain_row >= 0) {
                    const uint2 gain = *reinterpret_cast<const uint2*>(p.bank + gain_row * p.bank_stride + c);
                    v[part][0] += v[part][0] * low_bf16(gain.x), v[part][1] += v[part][1] * high_bf16(gain.x);
                    v[part][2] += v[part][2] * low_bf16(gain.y), v[part][3] += v[part][3] * high_bf16(gain.y);
                }
            }
            if (SILU) {
#pragma unroll
                for (int i = 0; i < 4; ++i) v[0][i] = silu(v[0][i]) * v[PARTS - 1][i];
            }
            v[0][0] += low_bf16(residual[u].x), v[0][1] += high_bf16(residual[u].x);
            v[0][2] += low_bf16(residual[u].y), v[0][3] += high_bf16(residual[u].y);
            *reinterpret_cast<uint2*>(p.y + static_cast<long long>(my_token[u]) * columns + my_column) =
                make_uint2(to_bf16x2(v[0][0], v[0][1]), to_bf16x2(v[0][2], v[0][3]));
        }
        __syncwarp();
    }
    if (!has_waited) wait_for_producer();
}

// Up to 64 tokens of one adapter, or of none, over outputs that are there already. One warp: 16 tokens; a block's four
// warps are below each other and go over `COLUMN_TILES` times 64 outputs, with h in shared memory.
template <bool SILU>
__device__ __forceinline__ void expand_large(const ExpandParams& p) {
    constexpr int PARTS = SILU ? 2 : 1, NT = 2, COLUMN_TILES = 4;
    extern __shared__ u32 h_pairs[];  // [PARTS][64][pitch] bf16: ranks 2 * i and 2 * i + 1
    const Step& step = p.step;
    const int pitch = (step.max_pages + 1) / 2 * PAGE_ROWS + 4;  // rows fall in different banks
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int columns = p.out_features / PARTS;
    const bool has_step = step.header != nullptr;
    const int width = step.max_pages * PAGE_ROWS;
    const long long slice_stride = static_cast<long long>(step.num_tokens) * p.num_sublinears * width;
    const bool writes_all = SILU || p.residual != nullptr;
    let_dependents_start();
    const int num_tiles = has_step ? step.header[writes_all ? 4 : 3] : (step.num_tokens + 63) / 64;
    wait_for_producer();

    for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
        int4 one = make_int4(-1, 0, -1, -1), two = make_int4(-1, min(64, step.num_tokens - index * 64), index * 64, 0);
        if (has_step) {
            one = *reinterpret_cast<const int4*>(step.large_tiles + index * RECORD + 4);
            two = *reinterpret_cast<const int4*>(step.large_tiles + index * RECORD + 8);
        }
        const int num_pages = one.y, gain_row = two.x, count = two.y, first = two.z;
        int my_token[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int position = warp * 16 + n * 8 + quad * 2 + t;
                my_token[n][t] = position < count ? (has_step ? step.token_order[first + position] : first + position) : -1;
            }
        int held = -1;  // the sublinear whose h is in shared memory (with SILU: both halves')
        for (int c = 0; c < COLUMN_TILES; ++c) {
            const int column = (blockIdx.x * COLUMN_TILES + c) * 64, my_column = column + group * 8;
            if (column >= columns) break;
            const bool is_inside = my_column < columns;
            BankRows bank[PARTS];
            uint4 linear[PARTS][NT][2], residual[NT][2];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                bank[part] = load_bank(p, one.z, one.w, my_column + part * columns, is_inside && num_pages > 0);
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int t = 0; t < 2; ++t) {
                        linear[part][n][t] = make_uint4(0, 0, 0, 0);
                        if (my_token[n][t] >= 0 && is_inside)
                            linear[part][n][t] = *reinterpret_cast<const uint4*>(
                                p.linear + static_cast<long long>(my_token[n][t]) * p.out_features + my_column + part * columns);
                    }
            }
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    residual[n][t] = make_uint4(0, 0, 0, 0);
                    if (p.residual && my_token[n][t] >= 0 && is_inside)
                        residual[n][t] = *reinterpret_cast<const uint4*>(
                            p.residual + static_cast<long long>(my_token[n][t]) * columns + my_column);
                }
            float acc[PARTS][NT][4][4] = {};
            if (num_pages > 0) {
                const Sublinears sublinears(p, column, min(64, columns - column));
                for (int s = sublinears.first; s <= sublinears.last; ++s) {
                    if (s != held) {
                        held = s;
                        __syncthreads();
                        const int pairs = (num_pages + 1) / 2 * PAGE_ROWS;
                        for (int i = threadIdx.x; i < 64 * pairs; i += 128) {
                            const int position = i / pairs, pair = i % pairs;
                            const bool is_there = position < count && pair < num_pages * (PAGE_ROWS / 2);
                            const int token = is_there ? step.token_order[first + position] : 0;
#pragma unroll
                            for (int part = 0; part < PARTS; ++part) {
                                float2 sum = make_float2(0.f, 0.f);
                                const float* h = p.h + (static_cast<long long>(token) * p.num_sublinears + s + part) * width + pair * 2;
                                for (int slice = 0; is_there && slice < p.num_slices; ++slice) {
                                    const float2 v = *reinterpret_cast<const float2*>(h + slice * slice_stride);
                                    sum.x += v.x, sum.y += v.y;
                                }
                                h_pairs[(part * 64 + position) * pitch + pair] = to_bf16x2(sum.x, sum.y);
                            }
                        }
                        __syncthreads();
                    }
                    for (int place = 0; place < num_pages; place += 2) {
#pragma unroll
                        for (int part = 0; part < PARTS; ++part) {
                            if (place > 0 || s > sublinears.first) {
                                const int* pages = step.page_table + one.x * step.max_pages + place;
                                bank[part] = load_bank(p, pages[0], place + 1 < num_pages ? pages[1] : -1,
                                                       my_column + part * columns, is_inside);
                            }
                            u32 h[NT][2];
#pragma unroll
                            for (int n = 0; n < NT; ++n)
#pragma unroll
                                for (int half = 0; half < 2; ++half)
                                    h[n][half] = h_pairs[(part * 64 + warp * 16 + n * 8 + group) * pitch + (place + half) * 4 + quad];
                            add_product<NT>(acc[part], bank[part], h, SILU || sublinears.mine == s);
                        }
                    }
                }
            }
            uint4 gain[PARTS];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                gain[part] = make_uint4(0, 0, 0, 0);
                if (gain_row >= 0 && is_inside)
                    gain[part] = *reinterpret_cast<const uint4*>(p.bank + gain_row * p.bank_stride + my_column + part * columns);
            }
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    if (my_token[n][t] < 0 || !is_inside) continue;
                    float v[PARTS][8];
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        const uint4 l = linear[part][n][t], g = gain[part];
                        const u32 words[4] = {l.x, l.y, l.z, l.w}, gains[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            v[part][2 * i] = low_bf16(words[i]) + acc[part][n][i][t];
                            v[part][2 * i + 1] = high_bf16(words[i]) + acc[part][n][i][t + 2];
                            v[part][2 * i] += v[part][2 * i] * low_bf16(gains[i]);
                            v[part][2 * i + 1] += v[part][2 * i + 1] * high_bf16(gains[i]);
                        }
                    }
                    const uint4 r = residual[n][t];
                    const u32 words[4] = {r.x, r.y, r.z, r.w};
                    u32 out[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float low = v[0][2 * i], high = v[0][2 * i + 1];
                        if (SILU) low = silu(low) * v[PARTS - 1][2 * i], high = silu(high) * v[PARTS - 1][2 * i + 1];
                        out[i] = to_bf16x2(low + low_bf16(words[i]), high + high_bf16(words[i]));
                    }
                    *reinterpret_cast<uint4*>(p.y + static_cast<long long>(my_token[n][t]) * columns + my_column) =
                        make_uint4(out[0], out[1], out[2], out[3]);
                }
        }
        __syncthreads();  // h is still being read
    }
}

#define EXPAND(NAME, BODY)                                                                               \
    extern "C" __global__ void __launch_bounds__(128) NAME(const __grid_constant__ ExpandParams p) {     \
        BODY(p);                                                                                         \
    }
EXPAND(lora_expand_small, (expand_small<false, false>))
EXPAND(lora_expand_silu_small, (expand_small<false, true>))
EXPAND(lora_finish_small, (expand_small<true, false>))
EXPAND(lora_finish_silu_small, (expand_small<true, true>))
EXPAND(lora_expand_large, expand_large<false>)
EXPAND(lora_expand_silu_large, expand_large<true>)
