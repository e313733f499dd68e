// Second half of LoRA: what lora_shrink.cu says of steps and records holds here too.

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
    int sublinear_end[4];  // first output after each
    SplitK split;
};

// y[t, c] = linear[t, c] + sum of h[t, s(c), j] * bank[row j of t's adapter, c], then y += y * gain[c] (DoRA), then
// the residual. With SILU: y[t, c] = silu(gate) * up of outputs c and c + out / 2.
//
// The matrix instruction has 16 outputs on its m side, 8 tokens on its n side and the ranks of two pages inside. A
// lane loads eight outputs in a row of four rows of the bank, and those are its outputs: instruction i has output 8
// * g + 2 * i as row g and the one after it as row g + 8.
struct BankRows {
    uint4 row[2][2];  // [page][rank rows 2 * quad and 2 * quad + 1]
};

// A lane's rows of two pages, at its outputs of the first 64; null where there is no page.
struct BankPointers {
    const u16* row[2][2];

    __device__ __forceinline__ void set(const ExpandParams& p, int page0, int page1) {
        const int group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int page = half ? page1 : page0;
                row[half][r] = nullptr;
                if (page >= 0)
                    row[half][r] = p.bank + (page * PAGE_ROWS + quad * 2 + r) * p.bank_stride + group * 8;
            }
    }
    __device__ __forceinline__ BankRows load(int column, bool is_inside) const {
        BankRows rows;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                rows.row[half][r] = make_uint4(0, 0, 0, 0);
                if (is_inside && row[half][r])
                    rows.row[half][r] = __ldg(reinterpret_cast<const uint4*>(row[half][r] + column));
            }
        return rows;
    }
};

// acc[i] += outputs x ranks x tokens.
__device__ __forceinline__ void add_product(float (&acc)[4][4], const BankRows& bank, const u32 (&h)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 a[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 r0 = bank.row[half][0], r1 = bank.row[half][1];
            const u32 low[4] = {r0.x, r0.y, r0.z, r0.w}, high[4] = {r1.x, r1.y, r1.z, r1.w};
            a[half][0] = __byte_perm(low[i], high[i], 0x5410);
            a[half][1] = __byte_perm(low[i], high[i], 0x7632);
        }
        mma(acc[i], a[0][0], a[0][1], a[1][0], a[1][1], h[0], h[1]);
    }
}

__device__ __forceinline__ void clear(BankRows& bank) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bank.row[i / 2][i % 2] = make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ int sublinear_of(const ExpandParams& p, int output) {
    int sublinear = 0;
#pragma unroll
    for (int s = 0; s < 3; ++s) sublinear += s + 1 < p.num_sublinears && output >= p.sublinear_end[s];
    return sublinear;
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Four outputs (of each part) of one token of the linear alone, as far as they can be asked for at once.
template <bool FROM_WORKSPACE, int PARTS>
struct Linear {
    static constexpr int SLOTS = PARTS == 2 ? 3 : 6;
    float4 slots[FROM_WORKSPACE ? PARTS : 1][FROM_WORKSPACE ? SLOTS : 1];
    uint2 whole[PARTS], residual;

    __device__ __forceinline__ void load(const ExpandParams& p, u32 token, int column, int columns,
                                         const int (&num_slots)[PARTS], u32 slot_stride, bool is_mine) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u32 at = token * p.out_features + column + part * columns;
            if (FROM_WORKSPACE) {
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) {
                    slots[part][s] = make_float4(0.f, 0.f, 0.f, 0.f);
                    if (is_mine && s < num_slots[part])
                        slots[part][s] = *reinterpret_cast<const float4*>(p.workspace + (s * slot_stride + at));
                }
            } else if (is_mine) {
                whole[part] = *reinterpret_cast<const uint2*>(p.linear + at);
            }
        }
        residual = make_uint2(0, 0);
        if (is_mine && p.residual)
            residual = *reinterpret_cast<const uint2*>(p.residual + (token * columns + column));
    }
    __device__ __forceinline__ void sum(float (&v)[4], const ExpandParams& p, int part, u32 at, int num_slots,
                                        u32 slot_stride) const {
        if (FROM_WORKSPACE) {
            float4 all = slots[part][0];
#pragma unroll
            for (int s = 1; s < SLOTS; ++s) {  // absent ones are zeros
                all.x += slots[part][s].x, all.y += slots[part][s].y;
                all.z += slots[part][s].z, all.w += slots[part][s].w;
            }
#pragma unroll 4
            for (int s = SLOTS; s < num_slots; ++s) {
                const float4 more = *reinterpret_cast<const float4*>(p.workspace + (s * slot_stride + at));
                all.x += more.x, all.y += more.y, all.z += more.z, all.w += more.w;
            }
            v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
        } else {
            v[0] = low_bf16(whole[part].x), v[1] = high_bf16(whole[part].x);
            v[2] = low_bf16(whole[part].y), v[3] = high_bf16(whole[part].y);
        }
    }
};

// Up to 4 tokens of one adapter, or of none. A warp goes over 64 outputs (or 64 gates and their ups) at a time, and
// all that it reads for them is asked for before any of it is used.
template <bool FROM_WORKSPACE, bool SILU>
__device__ __forceinline__ void expand_small(const ExpandParams& p) {
    constexpr int TILE = 4, PARTS = SILU ? 2 : 1, PITCH = 68, SLICES = 4;
    __shared__ __align__(16) float staging[4][PARTS][TILE * PITCH];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int columns = p.out_features / PARTS, column_tiles = (columns + 63) / 64;
    const bool has_step = step.header != nullptr;
    const int width = step.max_pages * PAGE_ROWS;
    const u32 slot_stride = step.num_tokens * p.out_features;  // the host keeps the workspace below 2**31 elements
    const u32 slice_stride = step.num_tokens * p.num_sublinears * width;
    const bool writes_all = FROM_WORKSPACE || SILU || p.residual != nullptr;  // tokens without an adapter too
    let_dependents_start();
    const int num_tiles = has_step ? step.header[writes_all ? 2 : 1] : (step.num_tokens + TILE - 1) / TILE;
    // The step's tiles x 64 outputs are dealt to all warps of the launch in equal runs, whatever their number.
    const int units = num_tiles * column_tiles, num_warps = gridDim.x * 4;
    const int run = (units + num_warps - 1) / num_warps, first_unit = (warp * gridDim.x + blockIdx.x) * run;
    int tile = first_unit / column_tiles, column_tile = first_unit - tile * column_tiles;
    int adapter = -1, num_pages = 0, gain_row = -1, count = 0, held = -1;
    bool has_record = false, has_waited = false, has_row = false;
    u32 my_token[2] = {0, 0}, h[PARTS][2];
    const float* my_h = p.h;
    BankPointers pointers;

    // The ranks of two pages from `place` on of the lane's token, as B operand.
    auto load_h = [&](u32(&pair)[2], int sublinear, int place) {
        const float* from = my_h + sublinear * width + place * PAGE_ROWS;
        const bool has_second = place + 1 < num_pages;
        float2 sum[2] = {make_float2(0.f, 0.f), make_float2(0.f, 0.f)};
        for (int slice = 0; slice < p.num_slices; slice += SLICES) {
            float2 v[SLICES][2];
#pragma unroll
            for (int i = 0; i < SLICES; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    v[i][half] = make_float2(0.f, 0.f);
                    if (has_row && slice + i < p.num_slices && (half == 0 || has_second))
                        v[i][half] =
                            *reinterpret_cast<const float2*>(from + (slice + i) * slice_stride + half * PAGE_ROWS);
                }
#pragma unroll
            for (int i = 0; i < SLICES; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) sum[half].x += v[i][half].x, sum[half].y += v[i][half].y;
        }
        pair[0] = to_bf16x2(sum[0].x, sum[0].y);
        pair[1] = to_bf16x2(sum[1].x, sum[1].y);
    };

    for (int unit = first_unit; unit < min(first_unit + run, units); ++unit, ++column_tile) {
        if (column_tile == column_tiles) column_tile = 0, ++tile, has_record = false;
        if (!has_record) {
            has_record = true;
            held = -1;  // the sublinear that `h` is of (with SILU: gate, and up)
            int4 tokens = make_int4(tile * TILE, tile * TILE + 1, tile * TILE + 2, tile * TILE + 3);
            int4 one = make_int4(-1, 0, -1, -1),
                 two = make_int4(-1, min(TILE, step.num_tokens - tile * TILE), 0, 0);
            if (has_step) {
                const int4* record = reinterpret_cast<const int4*>(step.small_tiles + tile * RECORD);
                tokens = record[0], one = record[1], two = record[2];
            }
            adapter = one.x, num_pages = one.y, gain_row = two.x, count = two.y;
            my_token[0] = lane < 16 ? tokens.x : tokens.y;
            my_token[1] = lane < 16 ? tokens.z : tokens.w;
            has_row = group < count;
            const int low_token = group & 1 ? tokens.y : tokens.x, high_token = group & 1 ? tokens.w : tokens.z;
            my_h =
                p.h + static_cast<u32>((group & 2 ? high_token : low_token) * p.num_sublinears * width) + quad * 2;
            pointers.set(p, one.z, one.w);
        }
        const int column = column_tile * 64, my_column = column + (lane & 15) * 4;
        const bool is_inside = column + group * 8 < columns;
        BankRows bank[PARTS];  // it was there before the step began
        if (num_pages > 0) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) bank[part] = pointers.load(column + part * columns, is_inside);
        }
        if (!has_waited) wait_for_producer();
        has_waited = true;

        // The linear alone, of the first two tokens: its first slots, or all of it.
        int num_slots[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            num_slots[part] = FROM_WORKSPACE ? p.split.num_slots((column + part * columns) / TILE_OUT) : 0;
        Linear<FROM_WORKSPACE, PARTS> linear;
        bool is_mine = (lane >> 4) < count && my_column < columns;
        linear.load(p, my_token[0], my_column, columns, num_slots, slot_stride, is_mine);

        // What the adapter adds, through shared memory to the lanes that add it.
        if (num_pages > 0) {
            const int first_sublinear = sublinear_of(p, column);
            const int last_sublinear = sublinear_of(p, min(column + 63, columns - 1));
            const int mine = sublinear_of(p, column + group * 8);
            const bool is_whole = first_sublinear == last_sublinear;
            if (is_whole && first_sublinear != held) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) load_h(h[part], first_sublinear + part, 0);
                held = first_sublinear;
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                float acc[4][4] = {};
                if (is_whole) add_product(acc, bank[part], h[part]);
                // More ranks; or outputs of more than one sublinear: each in turn, the others' as zeros.
                for (int s = first_sublinear; s <= last_sublinear; ++s)
                    for (int place = is_whole ? 2 : 0; place < num_pages; place += 2) {
                        const int* pages = step.page_table + adapter * step.max_pages + place;
                        BankPointers more;
                        more.set(p, pages[0], place + 1 < num_pages ? pages[1] : -1);
                        const BankRows rows =
                            more.load(column + part * columns, is_inside && (is_whole || mine == s));
                        u32 more_h[2];
                        load_h(more_h, s + part, place);
                        add_product(acc, rows, more_h);
                    }
                if (quad < 2) {
#pragma unroll
                    for (int t = 0; t < 2; ++t) {
                        float* to = staging[warp][part] + (quad * 2 + t) * PITCH + group * 8;
                        *reinterpret_cast<float4*>(to) =
                            make_float4(acc[0][t], acc[0][t + 2], acc[1][t], acc[1][t + 2]);
                        *reinterpret_cast<float4*>(to + 4) =
                            make_float4(acc[2][t], acc[2][t + 2], acc[3][t], acc[3][t + 2]);
                    }
                }
            }
            __syncwarp();
        }

        for (int position = lane >> 4, unit = 0; unit < count; unit += 2, position += 2) {
            const u32 token = unit ? my_token[1] : my_token[0];
            if (unit > 0) {
                is_mine = position < count && my_column < columns;
                linear.load(p, token, my_column, columns, num_slots, slot_stride, is_mine);
            }
            if (!is_mine) continue;
            float v[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int c = my_column + part * columns;
                linear.sum(v[part], p, part, token * p.out_features + c, num_slots[part], slot_stride);
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
            v[0][0] += low_bf16(linear.residual.x), v[0][1] += high_bf16(linear.residual.x);
            v[0][2] += low_bf16(linear.residual.y), v[0][3] += high_bf16(linear.residual.y);
            *reinterpret_cast<uint2*>(p.y + (token * columns + my_column)) =
                make_uint2(to_bf16x2(v[0][0], v[0][1]), to_bf16x2(v[0][2], v[0][3]));
        }
        __syncwarp();
    }
    if (!has_waited) wait_for_producer();
}

// Up to 64 tokens of one adapter, or of none, over outputs that are there already. One warp: 8 tokens; a block's
// eight warps are below each other and go over `COLUMN_TILES` times 64 outputs, with h in shared memory and the
// next outputs on their way.
template <bool SILU>
struct LargeTile {
    uint4 linear[SILU ? 2 : 1][2], residual[SILU ? 1 : 2];

    __device__ __forceinline__ void load(const u16* const (&from)[2], const u16* const (&residuals)[2], int columns,
                                         int tile, bool is_inside) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int part = 0; part < (SILU ? 2 : 1); ++part) {
                linear[part][t] = make_uint4(0, 0, 0, 0);
                if (from[t] && is_inside)
                    linear[part][t] = *reinterpret_cast<const uint4*>(from[t] + (tile * 64 + part * columns));
            }
            if (SILU) continue;
            residual[t] = make_uint4(0, 0, 0, 0);
            if (residuals[t] && is_inside) residual[t] = *reinterpret_cast<const uint4*>(residuals[t] + tile * 64);
        }
    }
};

template <bool SILU>
__device__ __forceinline__ void expand_large(const ExpandParams& p) {
    constexpr int PARTS = SILU ? 2 : 1, COLUMN_TILES = 8;
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
        int4 one = make_int4(-1, 0, -1, -1),
             two = make_int4(-1, min(64, step.num_tokens - index * 64), index * 64, 0);
        if (has_step) {
            one = *reinterpret_cast<const int4*>(step.large_tiles + index * RECORD + 4);
            two = *reinterpret_cast<const int4*>(step.large_tiles + index * RECORD + 8);
        }
        const int num_pages = one.y, gain_row = two.x, count = two.y, first = two.z;
        const int first_column = blockIdx.x * COLUMN_TILES * 64 + group * 8;  // the lane's
        const u16 *linears[2], *residuals[2];
        u16* outs[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int position = warp * 8 + quad * 2 + t;
            linears[t] = residuals[t] = outs[t] = nullptr;
            if (position >= count) continue;
            const long long token = has_step ? step.token_order[first + position] : first + position;
            linears[t] = p.linear + token * p.out_features + first_column;
            if (p.residual) residuals[t] = p.residual + token * columns + first_column;
            outs[t] = p.y + token * columns + first_column;
        }
        BankPointers pointers;
        pointers.set(p, one.z, one.w);
        LargeTile<SILU> next;
        next.load(linears, residuals, columns, 0, first_column < columns);
        int held = -1;  // the sublinear whose h is in shared memory (with SILU: both halves')
        for (int c = 0; c < COLUMN_TILES; ++c) {
            const int column = (blockIdx.x * COLUMN_TILES + c) * 64;
            const bool is_inside = column + group * 8 < columns;
            if (column >= columns) break;
            const LargeTile<SILU> now = next;
            if (c + 1 < COLUMN_TILES)
                next.load(linears, residuals, columns, c + 1, column + 64 + group * 8 < columns);
            float acc[PARTS][4][4] = {};
            if (num_pages > 0) {
                const int first_sublinear = sublinear_of(p, column);
                const int last_sublinear = sublinear_of(p, min(column + 63, columns - 1));
                const int mine = sublinear_of(p, column + group * 8);
                for (int s = first_sublinear; s <= last_sublinear; ++s) {
                    if (s != held) {
                        held = s;
                        __syncthreads();
                        const int pairs = (num_pages + 1) / 2 * PAGE_ROWS;
                        for (int i = threadIdx.x; i < 64 * pairs; i += 256) {
                            const int position = i / pairs, pair = i % pairs;
                            const bool is_there = position < count && pair < num_pages * (PAGE_ROWS / 2);
                            const int token = is_there ? step.token_order[first + position] : 0;
#pragma unroll
                            for (int part = 0; part < PARTS; ++part) {
                                float2 sum = make_float2(0.f, 0.f);
                                const float* h =
                                    p.h + (static_cast<long long>(token) * p.num_sublinears + s + part) * width +
                                    pair * 2;
#pragma unroll 4
                                for (int slice = 0; slice < (is_there ? p.num_slices : 0); ++slice) {
                                    const float2 v = *reinterpret_cast<const float2*>(h + slice * slice_stride);
                                    sum.x += v.x, sum.y += v.y;
                                }
                                h_pairs[(part * 64 + position) * pitch + pair] = to_bf16x2(sum.x, sum.y);
                            }
                        }
                        __syncthreads();
                    }
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        const u32* from = h_pairs + (part * 64 + warp * 8 + group) * pitch + quad;
                        const bool is_whole = first_sublinear == last_sublinear;
                        for (int place = 0; place < num_pages; place += 2) {
                            if (place > 0) {
                                const int* pages = step.page_table + one.x * step.max_pages + place;
                                pointers.set(p, pages[0], place + 1 < num_pages ? pages[1] : -1);
                            }
                            const BankRows bank =
                                pointers.load(column + part * columns, is_inside && (is_whole || mine == s));
                            const u32 h[2] = {from[place * 4], from[place * 4 + 4]};
                            add_product(acc[part], bank, h);
                        }
                        if (num_pages > 2) pointers.set(p, one.z, one.w);
                    }
                }
            }
            uint4 gain[PARTS];
            if (gain_row >= 0 && is_inside) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    gain[part] = *reinterpret_cast<const uint4*>(p.bank + gain_row * p.bank_stride + column +
                                                                 group * 8 + part * columns);
            }
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                float v[PARTS][8];
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const uint4 l = now.linear[part][t];
                    const u32 words[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        v[part][2 * i] = low_bf16(words[i]) + acc[part][i][t];
                        v[part][2 * i + 1] = high_bf16(words[i]) + acc[part][i][t + 2];
                    }
                    if (gain_row >= 0) {
                        const uint4 g = gain[part];
                        const u32 gains[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            v[part][2 * i] += v[part][2 * i] * low_bf16(gains[i]);
                            v[part][2 * i + 1] += v[part][2 * i + 1] * high_bf16(gains[i]);
                        }
                    }
                }
                u32 out[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float low = v[0][2 * i], high = v[0][2 * i + 1];
                    if (SILU) {
                        low = silu(low) * v[PARTS - 1][2 * i], high = silu(high) * v[PARTS - 1][2 * i + 1];
                    } else {
                        const uint4 r = now.residual[SILU ? 0 : t];
                        const u32 words[4] = {r.x, r.y, r.z, r.w};
                        low += low_bf16(words[i]), high += high_bf16(words[i]);
                    }
                    out[i] = to_bf16x2(low, high);
                }
                if (outs[t] && is_inside)
                    *reinterpret_cast<uint4*>(outs[t] + c * 64) = make_uint4(out[0], out[1], out[2], out[3]);
            }
        }
        __syncthreads();  // h is still being read
    }
}

#define EXPAND(NAME, THREADS, MIN_BLOCKS, BODY)                       \
    extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) \
        NAME(const __grid_constant__ ExpandParams p) {                \
        BODY(p);                                                      \
    }
EXPAND(lora_expand_small, 128, 4, (expand_small<false, false>))
EXPAND(lora_expand_silu_small, 128, 3, (expand_small<false, true>))
EXPAND(lora_finish_small, 128, 3, (expand_small<true, false>))
EXPAND(lora_finish_silu_small, 128, 3, (expand_small<true, true>))
EXPAND(lora_expand_large, 256, 2, expand_large<false>)
EXPAND(lora_expand_silu_large, 256, 2, expand_large<true>)
