// LoRA for a step whose tokens use different adapters, on tensor cores.
//
// An adapter's rank rows are in pages of eight rows of the banks. The host groups the step's tokens by adapter into
// tiles of 16 or 64 tokens (LoraGpuStep). Every count is read on the device, so a captured graph stays valid when the
// step changes. No sum depends on which other tokens are in the step.

constexpr int PAGE_ROWS = 8;

struct Step {
    const int* header;       // tiles with an adapter, all tiles, shrink items, 0
    const int4* tiles;       // first position in token_order, tokens, adapter or -1, 0
    const int2* items;       // tile, first page of the adapter
    const int* token_order;  // tokens by adapter, those without one last
    const int* page_table;   // [adapters, max_pages]
    const int* num_pages;    // [adapters]
    const int* gain_row;     // [adapters] bank row with DoRA's gain - 1 per output, or -1
    int max_pages, num_tokens;
};

struct ShrinkParams {
    Step step;
    const u16* x;     // [num_tokens, in] bf16
    const u16* bank;  // [rows, sublinears, in] bf16
    float* h;         // [slices, num_tokens, sublinears, max_pages * 8]
    long long x_stride, row_stride, sublinear_stride;  // in elements
    int in_features, slice_in;
};

// h[slice, t, s, j] = sum of x[t, k] * bank[row j of t's adapter, s, k] over the slice's k. One block: one tile of
// 16 * MT tokens, PG pages, one sublinear, one slice. The eight warps take blocks of 64 inputs in turn.
//
// Within 32 inputs a lane loads 16 bytes, eight inputs in a row, of its rows of x and of the bank: the order in which the
// matrix instruction meets the inputs is not theirs in memory, but it is the same on both sides.
template <int MT, int PG, int PIECES>
__device__ __forceinline__ void shrink(const ShrinkParams& p) {
    constexpr int WIDTH = PG * PAGE_ROWS;
    __shared__ float sums[8][MT * 16 * WIDTH];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int sublinear = blockIdx.y, slice = blockIdx.z;
    const int begin = slice * p.slice_in, span = min(p.slice_in, p.in_features - begin);
    const int num_items = step.header[2], width = step.max_pages * PAGE_ROWS;
    bool has_waited = false;
    let_dependents_start();
    for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
        const int2 item = step.items[index];
        const int4 tile = step.tiles[item.x];
        const int num_pages = min(PG, step.num_pages[tile.z] - item.y);
        const u16* rows[PG];
#pragma unroll
        for (int g = 0; g < PG; ++g) {
            const int page = g < num_pages ? step.page_table[tile.z * step.max_pages + item.y + g] : 0;
            rows[g] = p.bank + (page * PAGE_ROWS + group) * p.row_stride + sublinear * p.sublinear_stride + begin;
        }
        const u16* tokens[MT][2];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int position = m * 16 + r * 8 + group;
                tokens[m][r] = position < tile.y
                    ? p.x + step.token_order[tile.x + position] * p.x_stride + begin : nullptr;
            }
        float acc[MT][PG][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int g = 0; g < PG; ++g)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][g][i] = 0.f;

        for (int first = 0; (first / 2 * 8 + warp) * 64 < span; first += PIECES) {
            uint4 a[PIECES][PG];
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
                const int k = ((first + j) / 2 * 8 + warp) * 64 + (first + j) % 2 * 32 + quad * 8;
#pragma unroll
                for (int g = 0; g < PG; ++g)
                    a[j][g] = k < span && g < num_pages ? __ldg(reinterpret_cast<const uint4*>(rows[g] + k))
                                                        : make_uint4(0, 0, 0, 0);
            }
            if (!has_waited) wait_for_producer();  // the bank was there before the step began; x was not
            has_waited = true;
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
                const int k = ((first + j) / 2 * 8 + warp) * 64 + (first + j) % 2 * 32 + quad * 8;
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    uint4 x[2];
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        x[r] = k < span && tokens[m][r] ? *reinterpret_cast<const uint4*>(tokens[m][r] + k)
                                                        : make_uint4(0, 0, 0, 0);
#pragma unroll
                    for (int g = 0; g < PG; ++g) {
                        mma(acc[m][g], x[0].x, x[1].x, x[0].y, x[1].y, a[j][g].x, a[j][g].y);
                        mma(acc[m][g], x[0].z, x[1].z, x[0].w, x[1].w, a[j][g].z, a[j][g].w);
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int g = 0; g < PG; ++g)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[warp][(m * 16 + i / 2 * 8 + group) * WIDTH + g * PAGE_ROWS + quad * 2 + i % 2] = acc[m][g][i];
        __syncthreads();
        if (!has_waited) wait_for_producer();
        has_waited = true;
        for (int i = threadIdx.x; i < tile.y * WIDTH; i += 256) {
            const int position = i / WIDTH, rank = i % WIDTH;
            if (rank >= num_pages * PAGE_ROWS) continue;
            float sum = sums[0][i];
#pragma unroll
            for (int w = 1; w < 8; ++w) sum += sums[w][i];
            const long long token = step.token_order[tile.x + position];
            p.h[((slice * static_cast<long long>(step.num_tokens) + token) * gridDim.y + sublinear) * width +
                item.y * PAGE_ROWS + rank] = sum;
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
// the residual. With SILU: y[t, c] = silu(gate) * up of outputs c and c + out / 2. One warp: 16 tokens x 64 outputs;
// WARPS_M = 1: four warps side by side; 4: four warps below each other, for tiles of 64 tokens.
//
// As B operand a lane loads eight outputs in a row of two rows of the bank, so tile j of the matrix instruction holds
// outputs j, j + 8, ..., j + 56.
template <int WARPS_M, bool FROM_WORKSPACE, bool SILU>
__device__ __forceinline__ void expand(const ExpandParams& p) {
    constexpr int PARTS = SILU ? 2 : 1, PITCH = 68;
    constexpr bool WRITES_ALL = FROM_WORKSPACE || SILU;  // tokens without an adapter too
    __shared__ __align__(16) float staging[4][PARTS][16 * PITCH];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int below = WARPS_M == 4 ? warp : 0;
    const int column = (WARPS_M == 4 ? blockIdx.x : blockIdx.x * 4 + warp) * 64;
    const int columns = p.out_features / PARTS;
    const bool has_step = step.header != nullptr;
    const int num_tiles = has_step ? step.header[WRITES_ALL ? 1 : 0] : (step.num_tokens + 16 * WARPS_M - 1) / (16 * WARPS_M);
    const int width = step.max_pages * PAGE_ROWS;
    const long long slot_stride = static_cast<long long>(step.num_tokens) * p.out_features;
    const long long slice_stride = static_cast<long long>(step.num_tokens) * p.num_sublinears * width;
    bool has_waited = false;
    let_dependents_start();

    // Four outputs from `c` on of the linear alone.
    auto linear_of = [&](int token, int c) {
        const long long at = static_cast<long long>(token) * p.out_features + c;
        if (!FROM_WORKSPACE) {
            const uint2 v = *reinterpret_cast<const uint2*>(p.linear + at);
            return make_float4(low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y));
        }
        const int num_slots = p.split.num_slots(c / TILE_OUT);
        float4 sum = *reinterpret_cast<const float4*>(p.workspace + at);
#pragma unroll 4
        for (int slot = 1; slot < num_slots; ++slot) {
            const float4 v = *reinterpret_cast<const float4*>(p.workspace + slot * slot_stride + at);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        return sum;
    };

    for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
        int4 tile = make_int4(index * 16 * WARPS_M, min(16 * WARPS_M, step.num_tokens - index * 16 * WARPS_M), -1, 0);
        if (has_step) tile = step.tiles[index];
        const int first = tile.x + below * 16, count = min(16, tile.y - below * 16), adapter = tile.z;
        auto token_at = [&](int position) {
            return has_step ? step.token_order[first + position] : first + position;
        };
        const int num_pages = adapter >= 0 ? step.num_pages[adapter] : 0;
        if (count <= 0 || column >= columns) continue;  // whole warps

        const int my_column = column + (lane & 15) * 4, my_position = lane >> 4;
        float4 ahead[PARTS];
        bool has_ahead = false;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float acc[8][4];
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[j][i] = 0.f;
            const int from = column + part * columns;
            const int lane_column = from + group * 8;
            const bool is_inside = column + group * 8 < columns;
            int lane_sublinear = 0, first_sublinear = 0, last_sublinear = 0;
            const int last_column = min(column + 63, columns - 1) + part * columns;
#pragma unroll
            for (int s = 0; s < 3; ++s)
                if (s + 1 < p.num_sublinears) {
                    lane_sublinear += lane_column >= p.sublinear_end[s];
                    first_sublinear += from >= p.sublinear_end[s];
                    last_sublinear += last_column >= p.sublinear_end[s];
                }
            for (int page = 0; page < num_pages; page += 2) {
                const int* pages = step.page_table + adapter * step.max_pages + page;
                const bool has_second = page + 1 < num_pages;
                uint4 b[2][2];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        b[half][r] = make_uint4(0, 0, 0, 0);
                        if (is_inside && (half == 0 || has_second))
                            b[half][r] = __ldg(reinterpret_cast<const uint4*>(
                                p.bank + (pages[half] * PAGE_ROWS + quad * 2 + r) * p.bank_stride + lane_column));
                    }
                if (!has_waited) wait_for_producer();  // the bank was there before the step began
                has_waited = true;
                if (!has_ahead && part == 0) {  // asked for before h, so that both come together
#pragma unroll
                    for (int q = 0; q < PARTS; ++q)
                        if (my_position < count && my_column < columns)
                            ahead[q] = linear_of(token_at(my_position), my_column + q * columns);
                    has_ahead = true;
                }
                for (int s = first_sublinear; s <= last_sublinear; ++s) {
                    u32 a[2][2];  // [half of the ranks][token group, group + 8]
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float2 sum[2] = {make_float2(0.f, 0.f), make_float2(0.f, 0.f)};
                        if (r * 8 + group < count) {
                            const float* h = p.h + (static_cast<long long>(token_at(r * 8 + group)) * p.num_sublinears + s) * width +
                                             page * PAGE_ROWS + quad * 2;
#pragma unroll 4
                            for (int slice = 0; slice < p.num_slices; ++slice)
#pragma unroll
                                for (int half = 0; half < 2; ++half) {
                                    if (half == 1 && !has_second) continue;
                                    const float2 v = *reinterpret_cast<const float2*>(h + slice * slice_stride + half * PAGE_ROWS);
                                    sum[half].x += v.x, sum[half].y += v.y;
                                }
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
                            const u32* row0 = reinterpret_cast<const u32*>(&b[half][0]);
                            const u32* row1 = reinterpret_cast<const u32*>(&b[half][1]);
                            pair[half] = is_mine ? __byte_perm(row0[j / 2], row1[j / 2], j % 2 ? 0x7632 : 0x5410) : 0;
                        }
                        mma(acc[j], a[0][0], a[0][1], a[1][0], a[1][1], pair[0], pair[1]);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float* to = staging[warp][part] + (r * 8 + group) * PITCH + (quad * 2 + i) * 8;
                    *reinterpret_cast<float4*>(to) =
                        make_float4(acc[0][r * 2 + i], acc[1][r * 2 + i], acc[2][r * 2 + i], acc[3][r * 2 + i]);
                    *reinterpret_cast<float4*>(to + 4) =
                        make_float4(acc[4][r * 2 + i], acc[5][r * 2 + i], acc[6][r * 2 + i], acc[7][r * 2 + i]);
                }
        }
        __syncwarp();
        if (!has_waited) wait_for_producer();
        has_waited = true;
        const int gain_row = adapter >= 0 ? step.gain_row[adapter] : -1;
        for (int position = my_position; position < count && my_column < columns; position += 2) {
            const int token = token_at(position);
            float v[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int c = my_column + part * columns;
                const float4 own = has_ahead && position == my_position ? ahead[part] : linear_of(token, c);
                const float4 delta =
                    *reinterpret_cast<const float4*>(staging[warp][part] + position * PITCH + (lane & 15) * 4);
                v[part][0] = own.x + delta.x, v[part][1] = own.y + delta.y;
                v[part][2] = own.z + delta.z, v[part][3] = own.w + delta.w;
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
            const long long at = static_cast<long long>(token) * columns + my_column;
            if (p.residual) {
                const uint2 r = *reinterpret_cast<const uint2*>(p.residual + at);
                v[0][0] += low_bf16(r.x), v[0][1] += high_bf16(r.x), v[0][2] += low_bf16(r.y), v[0][3] += high_bf16(r.y);
            }
            *reinterpret_cast<uint2*>(p.y + at) = make_uint2(to_bf16x2(v[0][0], v[0][1]), to_bf16x2(v[0][2], v[0][3]));
        }
        __syncwarp();
    }
    if (!has_waited) wait_for_producer();
}

#define EXPAND(NAME, WARPS_M, FROM_WORKSPACE, SILU)                                                      \
    extern "C" __global__ void __launch_bounds__(128) NAME(const __grid_constant__ ExpandParams p) {     \
        expand<WARPS_M, FROM_WORKSPACE, SILU>(p);                                                        \
    }
EXPAND(lora_expand_16, 1, false, false)
EXPAND(lora_expand_64, 4, false, false)
EXPAND(lora_expand_silu_16, 1, false, true)
EXPAND(lora_expand_silu_64, 4, false, true)
EXPAND(lora_finish_16, 1, true, false)
EXPAND(lora_finish_64, 4, true, false)
EXPAND(lora_finish_silu_16, 1, true, true)
EXPAND(lora_finish_silu_64, 4, true, true)
