// LoRA for a step whose tokens use different adapters, on tensor cores.
//
// An adapter's rank rows are in pages of eight rows of the banks. The host groups the step's tokens by adapter and
// writes down everything a block has to know in one record (LoraGpuStep), so that its loads start at once. Counts are
// read on the device: a captured graph stays valid when the step changes. No sum depends on which other
// tokens are in the step.

constexpr int PAGE_ROWS = 8;

struct Step {
    const int* header;       // shrink items; tiles with an adapter, all tiles: small ones, then large ones
    const int4* items;       // page, second page or -1; first position in token_order; tokens | first page's place << 16
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

// h[slice, t, s, j] = sum of x[t, k] * bank[row j of t's adapter, s, k] over the slice's k. One block: one item (up to
// 16 * MT tokens, PG pages), one sublinear, one slice. The eight warps take blocks of 64 inputs in turn.
//
// Within 32 inputs a lane loads 16 bytes, eight inputs in a row, of its rows of x and of the bank: the order in which
// the matrix instruction meets the inputs is not theirs in memory, but it is the same on both sides.
template <int MT, int PG, int PIECES>
__device__ __forceinline__ void shrink(const ShrinkParams& p) {
    constexpr int WIDTH = PG * PAGE_ROWS;
    __shared__ float sums[8][MT * 16 * WIDTH];
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
        const int pages[2] = {item.x, item.y};
        const u16* rows[PG];
#pragma unroll
        for (int g = 0; g < PG; ++g)
            rows[g] = pages[g] < 0 ? nullptr
                                   : p.bank + (pages[g] * PAGE_ROWS + group) * p.row_stride +
                                         sublinear * p.sublinear_stride + begin;
        const u16* tokens[MT][2];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int position = m * 16 + r * 8 + group;
                tokens[m][r] = nullptr;
                if (position < count) tokens[m][r] = p.x + step.token_order[item.z + position] * p.x_stride + begin;
            }
        float acc[MT][PG][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int g = 0; g < PG; ++g)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][g][i] = 0.f;

        for (int first = 0; (first / 2 * 8 + warp) * 64 < span; first += PIECES) {
            int k[PIECES];
            uint4 a[PIECES][PG];
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
                k[j] = ((first + j) / 2 * 8 + warp) * 64 + (first + j) % 2 * 32 + quad * 8;
#pragma unroll
                for (int g = 0; g < PG; ++g) {
                    a[j][g] = make_uint4(0, 0, 0, 0);
                    if (k[j] < span && rows[g]) a[j][g] = __ldg(reinterpret_cast<const uint4*>(rows[g] + k[j]));
                }
            }
            if (!has_waited) wait_for_producer();  // the bank was there before the step began; x was not
            has_waited = true;
            uint4 x[PIECES][MT][2];
#pragma unroll
            for (int j = 0; j < PIECES; ++j)
#pragma unroll
                for (int m = 0; m < MT; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        x[j][m][r] = make_uint4(0, 0, 0, 0);
                        if (k[j] < span && tokens[m][r])
                            x[j][m][r] = *reinterpret_cast<const uint4*>(tokens[m][r] + k[j]);
                    }
#pragma unroll
            for (int j = 0; j < PIECES; ++j)
#pragma unroll
                for (int m = 0; m < MT; ++m)
#pragma unroll
                    for (int g = 0; g < PG; ++g) {
                        const uint4 x0 = x[j][m][0], x1 = x[j][m][1];
                        mma(acc[m][g], x0.x, x1.x, x0.y, x1.y, a[j][g].x, a[j][g].y);
                        mma(acc[m][g], x0.z, x1.z, x0.w, x1.w, a[j][g].z, a[j][g].w);
                    }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int g = 0; g < PG; ++g)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[warp][(m * 16 + i / 2 * 8 + group) * WIDTH + g * PAGE_ROWS + quad * 2 + i % 2] = acc[m][g][i];
        if (!has_waited) wait_for_producer();
        has_waited = true;
        __syncthreads();
        for (int i = threadIdx.x; i < count * WIDTH; i += 256) {
            const int position = i / WIDTH, rank = i % WIDTH;
            if (PG == 2 && rank >= PAGE_ROWS && pages[1] < 0) continue;
            float sum = sums[0][i];
#pragma unroll
            for (int w = 1; w < 8; ++w) sum += sums[w][i];
            const long long token = step.token_order[item.z + position];
            p.h[((slice * static_cast<long long>(step.num_tokens) + token) * gridDim.y + sublinear) * width +
                place * PAGE_ROWS + rank] = sum;
        }
        __syncthreads();
    }
    if (!has_waited) wait_for_producer();
}

extern "C" __global__ void __launch_bounds__(256) lora_shrink_16(const __grid_constant__ ShrinkParams p) {
    shrink<1, 1, 4>(p);
}
extern "C" __global__ void __launch_bounds__(256) lora_shrink_64(const __grid_constant__ ShrinkParams p) {
    shrink<4, 2, 1>(p);
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
// the residual. With SILU: y[t, c] = silu(gate) * up of outputs c and c + out / 2. One warp: TOKENS tokens x 64 outputs;
// four warps side by side for tiles of 4 tokens, below each other for those of 64.
//
// As B operand a lane loads eight outputs in a row of two rows of the bank, so tile j of the matrix instruction holds
// outputs j, j + 8, ..., j + 56. All that a warp reads is asked for before any of it is used.
template <bool IS_LARGE, bool FROM_WORKSPACE, bool SILU>
__device__ __forceinline__ void expand(const ExpandParams& p) {
    constexpr int TOKENS = IS_LARGE ? 16 : 4, TILE = IS_LARGE ? 64 : 4, UNITS = TOKENS / 2;
    constexpr int PARTS = SILU ? 2 : 1, PITCH = 68, SLOTS = SILU ? 3 : 5, SLICES = 4;
    __shared__ __align__(16) float staging[4][PARTS][TOKENS * PITCH];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int below = IS_LARGE ? warp * 16 : 0;
    const int column = (IS_LARGE ? blockIdx.x : blockIdx.x * 4 + warp) * 64;
    const int columns = p.out_features / PARTS;
    const bool has_step = step.header != nullptr;
    const int width = step.max_pages * PAGE_ROWS;
    const long long slot_stride = static_cast<long long>(step.num_tokens) * p.out_features;
    const long long slice_stride = static_cast<long long>(step.num_tokens) * p.num_sublinears * width;
    const int my_column = column + (lane & 15) * 4;  // four outputs of each part, of every other token
    const bool writes_all = FROM_WORKSPACE || SILU || p.residual != nullptr;  // tokens without an adapter too
    bool has_waited = false;
    let_dependents_start();
    const int num_tiles = has_step ? step.header[(IS_LARGE ? 3 : 1) + (writes_all ? 1 : 0)]
                                   : (step.num_tokens + TILE - 1) / TILE;

    for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
        // What is to be done.
        int first = index * TILE, tile_tokens = min(TILE, step.num_tokens - first);
        int num_pages = 0, adapter = -1, gain_row = -1, page0 = 0, page1 = 0;
        const int* tokens = nullptr;
        if (has_step) {
            const int* record = (IS_LARGE ? step.large_tiles : step.small_tiles) + index * RECORD;
            const int4 one = *reinterpret_cast<const int4*>(record + 4);
            const int4 two = *reinterpret_cast<const int4*>(record + 8);
            adapter = one.x, num_pages = one.y, page0 = one.z, page1 = one.w;
            gain_row = two.x, tile_tokens = two.y, first = two.z;
            tokens = IS_LARGE ? step.token_order + first + below : record;
        }
        first += below;
        const int count = min(TOKENS, tile_tokens - below);
        if (count <= 0 || column >= columns) continue;  // whole warps
        int my_token[UNITS];
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            const int position = u * 2 + (lane >> 4);
            my_token[u] = position < count ? (tokens ? tokens[position] : first + position) : -1;
            if (my_column >= columns) my_token[u] = -1;
        }
        int row_token[IS_LARGE ? 2 : 1];
#pragma unroll
        for (int r = 0; r < (IS_LARGE ? 2 : 1); ++r)
            row_token[r] = r * 8 + group < count && tokens ? tokens[r * 8 + group] : -1;

        auto load_bank = [&](uint4 (&b)[2][2], int from, int page_a, int page_b) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int page = half ? page_b : page_a;
                    b[half][r] = make_uint4(0, 0, 0, 0);
                    if (column + group * 8 < columns && page >= 0)
                        b[half][r] = __ldg(reinterpret_cast<const uint4*>(
                            p.bank + (page * PAGE_ROWS + quad * 2 + r) * p.bank_stride + from + group * 8));
                }
        };
        uint4 b[PARTS][2][2];
        if (num_pages > 0) {  // the bank was there before the step began
#pragma unroll
            for (int part = 0; part < PARTS; ++part) load_bank(b[part], column + part * columns, page0, page1);
        }
        if (!has_waited) wait_for_producer();
        has_waited = true;

        // The linear alone: the first slots, or all of it.
        float4 slots[FROM_WORKSPACE ? PARTS : 1][FROM_WORKSPACE ? UNITS : 1][SLOTS];
        uint2 linear[PARTS][UNITS], residual[UNITS];
        int num_slots[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (FROM_WORKSPACE) num_slots[part] = p.split.num_slots((column + part * columns) / TILE_OUT);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                const long long at = static_cast<long long>(my_token[u]) * p.out_features + my_column + part * columns;
                if (FROM_WORKSPACE) {
#pragma unroll
                    for (int s = 0; s < SLOTS; ++s) {
                        slots[part][u][s] = make_float4(0.f, 0.f, 0.f, 0.f);
                        if (my_token[u] >= 0 && s < num_slots[part])
                            slots[part][u][s] = *reinterpret_cast<const float4*>(p.workspace + s * slot_stride + at);
                    }
                } else {
                    linear[part][u] = make_uint2(0, 0);
                    if (my_token[u] >= 0) linear[part][u] = *reinterpret_cast<const uint2*>(p.linear + at);
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

        // What the adapter adds, into shared memory.
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (num_pages == 0) continue;
            const int from = column + part * columns;
            float acc[8][4];
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[j][i] = 0.f;
            int lane_sublinear = 0, first_sublinear = 0, last_sublinear = 0;
            const int last_column = min(column + 63, columns - 1) + part * columns;
#pragma unroll
            for (int s = 0; s < 3; ++s)
                if (s + 1 < p.num_sublinears) {
                    lane_sublinear += from + group * 8 >= p.sublinear_end[s];
                    first_sublinear += from >= p.sublinear_end[s];
                    last_sublinear += last_column >= p.sublinear_end[s];
                }
            for (int place = 0; place < num_pages; place += 2) {
                const bool has_second = place + 1 < num_pages;
                if (place > 0) {
                    const int* pages = step.page_table + adapter * step.max_pages + place;
                    load_bank(b[part], from, pages[0], has_second ? pages[1] : -1);
                }
                for (int s = first_sublinear; s <= last_sublinear; ++s) {
                    u32 a[2][2] = {{0, 0}, {0, 0}};  // [half of the ranks][token group, group + 8]
#pragma unroll
                    for (int r = 0; r < (IS_LARGE ? 2 : 1); ++r) {
                        const long long at = (static_cast<long long>(row_token[r]) * p.num_sublinears + s) * width +
                                             place * PAGE_ROWS + quad * 2;
                        float2 sum[2] = {make_float2(0.f, 0.f), make_float2(0.f, 0.f)};
                        for (int slice = 0; slice < p.num_slices; slice += SLICES) {
                            float2 v[SLICES][2];
#pragma unroll
                            for (int i = 0; i < SLICES; ++i)
#pragma unroll
                                for (int half = 0; half < 2; ++half) {
                                    v[i][half] = make_float2(0.f, 0.f);
                                    if (row_token[r] >= 0 && slice + i < p.num_slices && (half == 0 || has_second))
                                        v[i][half] = *reinterpret_cast<const float2*>(
                                            p.h + (slice + i) * slice_stride + at + half * PAGE_ROWS);
                                }
#pragma unroll
                            for (int i = 0; i < SLICES; ++i)
#pragma unroll
                                for (int half = 0; half < 2; ++half)
                                    sum[half].x += v[i][half].x, sum[half].y += v[i][half].y;
                        }
                        a[0][r] = to_bf16x2(sum[0].x, sum[0].y);
                        a[1][r] = to_bf16x2(sum[1].x, sum[1].y);
                    }
                    const bool is_mine = lane_sublinear == s;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        u32 pair[2];
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const uint4 r0 = b[part][half][0], r1 = b[part][half][1];
                            const u32 row0[4] = {r0.x, r0.y, r0.z, r0.w}, row1[4] = {r1.x, r1.y, r1.z, r1.w};
                            pair[half] = is_mine ? __byte_perm(row0[j / 2], row1[j / 2], j % 2 ? 0x7632 : 0x5410) : 0;
                        }
                        mma(acc[j], a[0][0], a[0][1], a[1][0], a[1][1], pair[0], pair[1]);
                    }
                }
            }
            if (IS_LARGE || group < TOKENS) {
#pragma unroll
                for (int r = 0; r < (IS_LARGE ? 2 : 1); ++r)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float* to = staging[warp][part] + (r * 8 + group) * PITCH + (quad * 2 + i) * 8;
                        *reinterpret_cast<float4*>(to) =
                            make_float4(acc[0][r * 2 + i], acc[1][r * 2 + i], acc[2][r * 2 + i], acc[3][r * 2 + i]);
                        *reinterpret_cast<float4*>(to + 4) =
                            make_float4(acc[4][r * 2 + i], acc[5][r * 2 + i], acc[6][r * 2 + i], acc[7][r * 2 + i]);
                    }
            }
        }
        __syncwarp();

        // Together.
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
                for (int i = 0; i < 4; ++i) v[0][i] = v[0][i] / (1.f + __expf(-v[0][i])) * v[PARTS - 1][i];
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

#define EXPAND(NAME, IS_LARGE, FROM_WORKSPACE, SILU)                                                     \
    extern "C" __global__ void __launch_bounds__(128) NAME(const __grid_constant__ ExpandParams p) {     \
        expand<IS_LARGE, FROM_WORKSPACE, SILU>(p);                                                       \
    }
EXPAND(lora_expand_small, false, false, false)
EXPAND(lora_expand_large, true, false, false)
EXPAND(lora_expand_silu_small, false, false, true)
EXPAND(lora_expand_silu_large, true, false, true)
EXPAND(lora_finish_small, false, true, false)
EXPAND(lora_finish_silu_small, false, true, true)
