// Second half of LoRA: what lora_shrink.cu says of steps and records holds here too. lora_endings.cuh has what is
// done to a row besides.

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
// is asked for before any of it is used. A column is an output, or two in parts of their own: a gate and its up, or
// the two of a head that are turned together.
template <bool FROM_WORKSPACE, Ending ENDING>
__device__ __forceinline__ void expand_small(const ExpandParams& p) {
    constexpr int PARTS = ENDING == WITH_SILU || ENDING == WITH_ROTARY ? 2 : 1;
    // Asked for at once: as many as linears that end so have in a 7B model on 132 multiprocessors.
    constexpr int SLOTS = ENDING == WITH_SILU ? 3 : ENDING == WITH_NORM ? 9 : 6;
    constexpr int SUBLINEARS = ENDING == WITH_SILU ? 2 : 1;  // whose h is needed at a time
    constexpr int TILE = 4, PITCH = 68, SLICES = 4;
    __shared__ __align__(16) float staging[4][PARTS][TILE * PITCH];
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
    // The step's tiles x 64 outputs are dealt to all warps of the launch in equal runs, whatever their number.
    const int units = num_tiles * column_tiles, num_warps = gridDim.x * 4;
    const int run = (units + num_warps - 1) / num_warps, first_unit = (warp * gridDim.x + blockIdx.x) * run;
    int tile = first_unit / column_tiles, column_tile = first_unit - tile * column_tiles;
    int adapter = -1, num_pages = 0, gain_row = -1, count = 0, held = -1;
    bool has_record = false, has_waited = false, has_row = false, is_new = false;
    u32 my_token[2] = {0, 0}, h[SUBLINEARS][2];
    const float* my_h = p.h;
    BankPointers pointers;
    RowScales scales;
    scales.scale[0] = scales.scale[1] = 1.f;
    Places places;
    const bool has_input_norm = FROM_WORKSPACE && p.input_norm.squares != nullptr;

    // A column's output in part 0: heads lie side by side, their second halves left out of the count.
    auto output_of = [&](int column) {
        return ENDING == WITH_ROTARY ? column + (column >> p.rotary.log_half << p.rotary.log_half) : column;
    };

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
            has_record = is_new = true;
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
        const int my_output = output_of(my_column);
        const bool is_inside = column + group * 8 < columns;
        const int bank_column = output_of(column + group * 8) - group * 8;
        BankRows bank[PARTS];  // it was there before the step began
        if (num_pages > 0) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                bank[part] = pointers.load(bank_column + part * part_stride, is_inside);
        }
        uint2 norm_weight = make_uint2(0, 0);  // so was this
        if (ENDING == WITH_NORM && my_column < columns)
            norm_weight = __ldg(reinterpret_cast<const uint2*>(p.output_norm.weight + my_column));
        if (!has_waited) wait_for_producer();
        has_waited = true;

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
            const int first_sublinear = sublinear_of(p, output_of(column));
            const int last_sublinear = sublinear_of(p, output_of(min(column + 63, columns - 1)));
            const int mine = sublinear_of(p, output_of(column + group * 8));
            const bool is_whole = first_sublinear == last_sublinear;
            if (is_whole && first_sublinear != held) {
#pragma unroll
                for (int i = 0; i < SUBLINEARS; ++i) load_h(h[i], first_sublinear + i, 0);
                held = first_sublinear;
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int own = part < SUBLINEARS ? part : 0;  // whose h
                float acc[4][4] = {};
                if (is_whole) add_product(acc, bank[part], h[own]);
                // More ranks; or outputs of more than one sublinear: each in turn, the others' as zeros.
                for (int s = first_sublinear; s <= last_sublinear; ++s)
                    for (int place = is_whole ? 2 : 0; place < num_pages; place += 2) {
                        const int* pages = step.page_table + adapter * step.max_pages + place;
                        BankPointers more;
                        more.set(p, pages[0], place + 1 < num_pages ? pages[1] : -1);
                        const BankRows rows =
                            more.load(bank_column + part * part_stride, is_inside && (is_whole || mine == s));
                        u32 more_h[2];
                        load_h(more_h, s + own, place);
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
    if (!has_waited) wait_for_producer();
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
