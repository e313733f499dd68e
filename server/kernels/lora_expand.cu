// Second half of LoRA: what lora_shrink.cu says of steps and records holds here too. lora_endings.cuh has what is
// done to a row besides.

// A tile's record: 4 tokens (small tiles); adapter or -1, pages, first page, second page; bank row with DoRA's gain
// - 1 or -1, tokens in the tile, first position in token_order, and for small tiles what 64 columns of it cost <<
// COST_SHIFT | what those of the tiles before it do.
constexpr int RECORD = 12;
constexpr int COST_SHIFT = 20;

struct ExpandParams {
    Step step;               // header is null: no adapters in this step
    const float* h;          // [slices, num_tokens, sublinears, max_pages * 8]
    const u16* bank;         // [rows, out] bf16: row j of an adapter is B's column j
    const float* workspace;  // [slots, num_tokens, out] fp32, where the linear's split-K sums are still apart
    const u16* linear;       // [num_tokens, out] bf16, where they are not; may be y
    const u16* residual;     // [num_tokens, out] bf16, or null
    u16* y;                  // [num_tokens, out] bf16; [num_tokens, out / 2] WITH_SILU; the queries WITH_ROTARY
    long long bank_stride;   // in elements
    int out_features, num_sublinears, num_slices;
    int sublinear_end[4];  // first output after each
    SplitK split;
    InputNorm input_norm;    // only where the sums are still apart
    OutputNorm output_norm;  // WITH_NORM
    Rotary rotary;           // WITH_ROTARY
};
static_assert(sizeof(ExpandParams) == 256, "Python packs these parameters");

// y[t, c] = linear[t, c] + sum of h[t, s(c), j] * bank[row j of t's adapter, c], divided by the root mean square of
// the input's row (a norm before), then y += y * gain[c] (DoRA), then the residual. With SILU: y[t, c] = silu(gate)
// * up of outputs c and c + out / 2.
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

// Keep the ranks of pairs of pages of a lane's token, as B operands. Columns 4 to 7 of the instruction are no
// tokens: their lanes load the second pages for those of the first, and multiply whatever.
//
// from   h of the first slice and of the lane's first page
// pages  that the token has from the lane's first one on
template <int PAIRS>
__device__ __forceinline__ void keep_h(uint2 (*to)[16], const float* from, int pages, int num_slices,
                                       u32 slice_stride) {
    constexpr int SLICES = 4;  // at once
    const int lane = threadIdx.x & 31;
    float2 sum[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) sum[i] = make_float2(0.f, 0.f);
    for (int slice = 0; slice < num_slices; slice += SLICES) {
        float2 v[SLICES][PAIRS];
#pragma unroll
        for (int s = 0; s < SLICES; ++s)
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                v[s][i] = make_float2(0.f, 0.f);
                if (slice + s < num_slices && 2 * i < pages)
                    v[s][i] =
                        *reinterpret_cast<const float2*>(from + (slice + s) * slice_stride + i * (2 * PAGE_ROWS));
            }
#pragma unroll
        for (int s = 0; s < SLICES; ++s)
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) sum[i].x += v[s][i].x, sum[i].y += v[s][i].y;
    }
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const u32 mine = to_bf16x2(sum[i].x, sum[i].y), second = __shfl_xor_sync(0xffffffff, mine, 16);
        if (lane < 16) to[i][lane] = make_uint2(mine, second);
    }
    __syncwarp();
}

__device__ __forceinline__ int sublinear_of(const ExpandParams& p, int output) {
    int sublinear = 0;
#pragma unroll
    for (int s = 0; s < 3; ++s) sublinear += s + 1 < p.num_sublinears && output >= p.sublinear_end[s];
    return sublinear;
}

// Four outputs (of each part) of one token of the linear alone, as far as they can be asked for at once.
template <bool FROM_WORKSPACE, int PARTS, int SLOTS>
struct Linear {
    float4 slots[FROM_WORKSPACE ? PARTS : 1][FROM_WORKSPACE ? SLOTS : 1];
    uint2 whole[PARTS], residual;

    __device__ __forceinline__ void load(const ExpandParams& p, u32 token, int output, int part_stride,
                                         const int (&num_slots)[PARTS], u32 slot_stride, bool is_mine) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u32 at = token * p.out_features + output + part * part_stride;
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
        residual = make_uint2(0, 0);  // none WITH_ROTARY; else y's rows are as long as the parts
        if (is_mine && p.residual)
            residual = *reinterpret_cast<const uint2*>(p.residual + (token * part_stride + output));
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

// Up to 4 tokens of one adapter, or of none. A warp goes over 64 columns at a time, and all that it reads for them
// is asked for before any of it is used, except that pages beyond the first two come first, a few at a time. A
// column is an output, or two in parts of their own: a gate and its up, or the two of a head that are turned
// together.
template <bool FROM_WORKSPACE, Ending ENDING>
__device__ __forceinline__ void expand_small(const ExpandParams& p) {
    constexpr int PARTS = ENDING == WITH_SILU || ENDING == WITH_ROTARY ? 2 : 1;
    // Asked for at once: as many as linears that end so have in a 7B model on 132 multiprocessors.
    constexpr int SLOTS = ENDING == WITH_SILU ? 3 : ENDING == WITH_NORM ? 9 : 6;
    constexpr int SUBLINEARS = ENDING == WITH_SILU ? 2 : 1;  // whose h is needed at a time
    constexpr int TILE = 4, PITCH = 68;
    // Pairs of pages beyond the first that are asked for at once.
    constexpr int MORE = FROM_WORKSPACE || ENDING != PLAIN ? 3 : 2;
    __shared__ __align__(16) float staging[4][PARTS][TILE * PITCH];
    __shared__ uint2 kept_h[4][SUBLINEARS][1 + MORE][16];
    const Step& step = p.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int columns = p.out_features / PARTS, column_tiles = (columns + 63) / 64;
    const int part_stride = ENDING == WITH_ROTARY ? 1 << p.rotary.log_half : columns;
    const bool has_step = step.header != nullptr;
    const int width = step.max_pages * PAGE_ROWS;
    const u32 slot_stride = step.num_tokens * p.out_features;  // the host keeps the workspace below 2**31 elements
    const u32 slice_stride = step.num_tokens * p.num_sublinears * width;
    // Tokens without an adapter too.
    const bool writes_all = FROM_WORKSPACE || ENDING != PLAIN || p.residual != nullptr;
    let_dependents_start();
    const int num_tiles = has_step ? step.header[writes_all ? 2 : 1] : (step.num_tokens + TILE - 1) / TILE;
    // The step's units, tiles x 64 columns, are dealt to all warps of the launch by what they cost, in equal runs
    // that are not below the least unit: a warp has the units that end in its run.
    const int total_cost = (has_step ? step.header[writes_all ? 6 : 5] : num_tiles) * column_tiles;
    const int least_cost = has_step ? step.header[7] : 1, num_warps = gridDim.x * 4;
    const int run = max((total_cost + num_warps - 1) / num_warps, least_cost);
    const int run_start = (warp * gridDim.x + blockIdx.x) * run, run_end = min(run_start + run, total_cost);
    // The unit where the run starts. There are no more tiles than tokens, and no more tokens than records.
    int tile = run_start / column_tiles, column_tile = 0;
    if (has_step) {
        tile = -1;
#pragma unroll 2
        for (int first = 0; first < step.num_tokens; first += 32) {
            int cost = 0;
            if (first + lane < step.num_tokens) cost = step.small_tiles[(first + lane) * RECORD + RECORD - 1];
            const int start = (cost & ((1 << COST_SHIFT) - 1)) * column_tiles;
            tile += __popc(__ballot_sync(0xffffffff, first + lane < num_tiles && start <= run_start));
        }
    }
    int cost = 1, unit_end = 0;  // of a unit of the tile; where the unit ends
    int adapter = -1, num_pages = 0, gain_row = -1, count = 0, held = -1;
    bool has_record = false, is_first = true, is_new = false;
    u32 my_token[2] = {0, 0};
    u32 my_h = 0;      // where the lane's h begins
    int my_pages = 0;  // that it has from there on
    int first_page = -1, second_page = -1;
    RowScales scales;
    scales.scale[0] = scales.scale[1] = 1.f;
    Places places;
    const bool has_input_norm = FROM_WORKSPACE && p.input_norm.squares != nullptr;

    // A column's output in part 0: heads lie side by side, their second halves left out of the count.
    auto output_of = [&](int column) {
        return ENDING == WITH_ROTARY ? column + (column >> p.rotary.log_half << p.rotary.log_half) : column;
    };

    // The ranks of the first pair of pages; of further ones from `place` on.
    auto keep_first_h = [&](int own, int sublinear) {
        keep_h<1>(kept_h[warp][own], p.h + my_h + sublinear * width, my_pages, p.num_slices, slice_stride);
    };
    auto keep_more_h = [&](int own, int sublinear, int place) {
        const float* from = p.h + my_h + sublinear * width + place * PAGE_ROWS;
        keep_h<MORE>(kept_h[warp][own] + 1, from, my_pages - place, p.num_slices, slice_stride);
    };
    auto multiply = [&](float(&acc)[4][4], const BankRows& bank, int own, int at) {
        const uint2 pair = kept_h[warp][own][at][lane & 15];
        const u32 h[2] = {pair.x, pair.y};
        add_product(acc, bank, h);
    };

    // A lane's outputs of the tile's tokens, to where `to` has a row of 64 for each token, or in addition to them.
    auto put = [&](float* to, const float(&acc)[4][4], bool is_more) {
        if (quad >= 2) return;
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float4* at = reinterpret_cast<float4*>(to + (quad * 2 + t) * PITCH + group * 8 + half * 4);
                float4 v = make_float4(acc[half * 2][t], acc[half * 2][t + 2], acc[half * 2 + 1][t],
                                       acc[half * 2 + 1][t + 2]);
                if (is_more) v.x += at->x, v.y += at->y, v.z += at->z, v.w += at->w;
                *at = v;
            }
    };

    for (;; ++column_tile, unit_end += cost) {
        if (column_tile == column_tiles) column_tile = 0, ++tile, has_record = false;
        if (!has_record) {
            if (tile >= num_tiles || run_start >= run_end) break;
            has_record = is_new = true;
            held = -1;  // the sublinear that `kept_h` is of (with SILU: gate, and up)
            int4 tokens = make_int4(tile * TILE, tile * TILE + 1, tile * TILE + 2, tile * TILE + 3);
            int4 one = make_int4(-1, 0, -1, -1),
                 two = make_int4(-1, min(TILE, step.num_tokens - tile * TILE), 0, 1 << COST_SHIFT | tile);
            if (has_step) {
                const int4* record = reinterpret_cast<const int4*>(step.small_tiles + tile * RECORD);
                tokens = record[0], one = record[1], two = record[2];
            }
            adapter = one.x, num_pages = one.y, gain_row = two.x, count = two.y;
            cost = two.w >> COST_SHIFT;
            const int tile_start = (two.w & ((1 << COST_SHIFT) - 1)) * column_tiles;
            if (is_first) column_tile = (run_start - tile_start) / cost;
            unit_end = tile_start + (column_tile + 1) * cost;
            my_token[0] = lane < 16 ? tokens.x : tokens.y;
            my_token[1] = lane < 16 ? tokens.z : tokens.w;
            my_pages = (group & 3) < count ? num_pages - (lane >> 4) : 0;
            const int low_token = group & 1 ? tokens.y : tokens.x, high_token = group & 1 ? tokens.w : tokens.z;
            my_h = (group & 2 ? high_token : low_token) * p.num_sublinears * width;
            my_h += (lane >> 4) * PAGE_ROWS + quad * 2;
            first_page = one.z, second_page = one.w;
        }
        if (unit_end > run_end) break;
        const int column = column_tile * 64, my_column = column + (lane & 15) * 4;
        const int my_output = output_of(my_column);
        const bool is_inside = column + group * 8 < columns;
        const int bank_column = output_of(column + group * 8) - group * 8;
        // Pages beyond the first pair; or, where there are outputs of more than one sublinear, all of them: each
        // sublinear in turn, the others' outputs as zeros.
        const int first_sublinear = sublinear_of(p, output_of(column));
        const int last_sublinear = sublinear_of(p, output_of(min(column + 63, columns - 1)));
        const bool is_whole = first_sublinear == last_sublinear;
        const int more_place = is_whole ? 2 : 0;
        const bool has_more = num_pages > more_place;
        BankRows rows[MORE];
        auto load_more = [&](int part, int sublinear, int place) {
            const int* pages = step.page_table + adapter * step.max_pages;
            const bool is_wanted = is_whole || sublinear_of(p, output_of(column + group * 8)) == sublinear;
#pragma unroll
            for (int i = 0; i < MORE; ++i, place += 2) {
                BankPointers more;
                more.set(p, place < num_pages ? pages[place] : -1, place + 1 < num_pages ? pages[place + 1] : -1);
                rows[i] = more.load(bank_column + part * part_stride, is_inside && is_wanted);
            }
        };
        BankRows bank[PARTS];
        auto load_first = [&] {
            BankPointers pointers;
            pointers.set(p, first_page, second_page);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                bank[part] = pointers.load(bank_column + part * part_stride, is_inside);
        };
        // The bank was there before the step began.
        if (has_more)
            load_more(0, first_sublinear, more_place);
        else if (num_pages > 0)
            load_first();
        uint2 norm_weight = make_uint2(0, 0);  // so was this
        if (ENDING == WITH_NORM && my_column < columns)
            norm_weight = __ldg(reinterpret_cast<const uint2*>(p.output_norm.weight + my_column));
        if (is_first) wait_for_producer();
        is_first = false;

        // What the further pages add, before anything else needs registers.
        if (has_more) {
            const bool is_kept = is_whole && num_pages <= 2 + 2 * MORE;
            if (is_kept && held != first_sublinear) {
#pragma unroll
                for (int i = 0; i < SUBLINEARS; ++i) keep_more_h(i, first_sublinear + i, 2);
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int own = part < SUBLINEARS ? part : 0;  // whose h
                float acc[4][4] = {};
                for (int s = first_sublinear; s <= last_sublinear; ++s)
                    for (int place = more_place; place < num_pages; place += 2 * MORE) {
                        if (part > 0 || s > first_sublinear || place > more_place) load_more(part, s, place);
                        if (!is_kept) keep_more_h(own, s + own, place);
#pragma unroll
                        for (int i = 0; i < MORE; ++i)
                            if (place + 2 * i < num_pages) multiply(acc, rows[i], own, 1 + i);
                    }
                put(staging[warp][part], acc, false);
            }
            if (is_whole)
                load_first();
            else
                held = -1;
        }

        // The linear alone, of the first two tokens: its first slots, or all of it.
        if (ENDING == WITH_ROTARY && is_new) places.ask(p.rotary, my_token, count);
        int num_slots[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            // A head's halves are in one tile: 64 columns are 128 outputs, or half of one head's 256.
            const int first = ENDING == WITH_ROTARY ? output_of(column) : column + part * columns;
            num_slots[part] = FROM_WORKSPACE ? p.split.num_slots(first / TILE_OUT) : 0;
        }
        Linear<FROM_WORKSPACE, PARTS, SLOTS> linear;
        bool is_mine = (lane >> 4) < count && my_column < columns;
        linear.load(p, my_token[0], my_output, part_stride, num_slots, slot_stride, is_mine);
        if (has_input_norm && is_new) scales.ask(p.input_norm, my_token, count);
        Angles angles;
        const bool is_rotated = ENDING == WITH_ROTARY && my_output < p.sublinear_end[1];
        if (ENDING == WITH_ROTARY)
            angles.load(p.rotary, places.row[0], my_column, is_mine && is_rotated);

        // What the adapter adds, through shared memory to the lanes that add it.
        if (num_pages > 0) {
            if (is_whole && first_sublinear != held) {
#pragma unroll
                for (int i = 0; i < SUBLINEARS; ++i) keep_first_h(i, first_sublinear + i);
                held = first_sublinear;
            }
            if (is_whole) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    float acc[4][4] = {};
                    multiply(acc, bank[part], part < SUBLINEARS ? part : 0, 0);
                    put(staging[warp][part], acc, has_more);
                }
            }
            __syncwarp();
        }

        if (has_input_norm && is_new) scales.settle(p.input_norm, my_token, count);
        is_new = false;
        for (int t = 0; t * 2 < count; ++t) {
            const int position = t * 2 + (lane >> 4);
            const u32 token = t ? my_token[1] : my_token[0];
            if (t > 0) {
                is_mine = position < count && my_column < columns;
                linear.load(p, token, my_output, part_stride, num_slots, slot_stride, is_mine);
                if (ENDING == WITH_ROTARY)
                    angles.load(p.rotary, places.row[1], my_column, is_mine && is_rotated);
            }
            float square = 0.f;
            if (is_mine) {
                const float scale = t ? scales.scale[1] : scales.scale[0];
                float v[PARTS][4];
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const int output = my_output + part * part_stride;
                    linear.sum(v[part], p, part, token * p.out_features + output, num_slots[part], slot_stride);
                    if (num_pages > 0) {
                        const float4 delta = *reinterpret_cast<const float4*>(staging[warp][part] +
                                                                              position * PITCH + (lane & 15) * 4);
                        v[part][0] += delta.x, v[part][1] += delta.y, v[part][2] += delta.z, v[part][3] += delta.w;
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) v[part][i] = __fmul_rn(v[part][i], scale);  // by 1: no change
                    if (gain_row >= 0) {
                        const u16* gains = p.bank + gain_row * p.bank_stride + output;
                        const uint2 gain = *reinterpret_cast<const uint2*>(gains);
                        v[part][0] += v[part][0] * low_bf16(gain.x), v[part][1] += v[part][1] * high_bf16(gain.x);
                        v[part][2] += v[part][2] * low_bf16(gain.y), v[part][3] += v[part][3] * high_bf16(gain.y);
                    }
                }
                if constexpr (ENDING == WITH_ROTARY) {
                    write_rotated(v, p.rotary, angles, t ? places.slot[1] : places.slot[0], p.y, token, my_output,
                                  p.sublinear_end[0], p.sublinear_end[1]);
                } else {
                    if (ENDING == WITH_SILU) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) v[0][i] = silu(v[0][i]) * v[PARTS - 1][i];
                    }
                    v[0][0] += low_bf16(linear.residual.x), v[0][1] += high_bf16(linear.residual.x);
                    v[0][2] += low_bf16(linear.residual.y), v[0][3] += high_bf16(linear.residual.y);
                    const uint2 out = make_uint2(to_bf16x2(v[0][0], v[0][1]), to_bf16x2(v[0][2], v[0][3]));
                    const u32 at = token * columns + my_column;
                    *reinterpret_cast<uint2*>(p.y + at) = out;
                    if (ENDING == WITH_NORM) square = write_scaled(out, norm_weight, p.output_norm.scaled + at);
                }
            }
            if (ENDING == WITH_NORM) {
                square = half_warp_sum(square);
                if ((lane & 15) == 0 && position < count)
                    p.output_norm.squares[token * column_tiles + column_tile] = square;
            }
        }
        __syncwarp();
    }
    if (is_first) wait_for_producer();
}

#define EXPAND(NAME, THREADS, MIN_BLOCKS, BODY)                       \
    extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) \
        NAME(const __grid_constant__ ExpandParams p) {                \
        BODY(p);                                                      \
    }
EXPAND(lora_expand_small, 128, 4, (expand_small<false, PLAIN>))
EXPAND(lora_expand_silu_small, 128, 3, (expand_small<false, WITH_SILU>))
EXPAND(lora_finish_small, 128, 3, (expand_small<true, PLAIN>))
EXPAND(lora_finish_silu_small, 128, 3, (expand_small<true, WITH_SILU>))
EXPAND(lora_finish_norm_small, 128, 3, (expand_small<true, WITH_NORM>))
EXPAND(lora_finish_rotary_small, 128, 3, (expand_small<true, WITH_ROTARY>))
