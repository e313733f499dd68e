// `expand` for longer steps: what lora_expand.cu says of operands holds here too.

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

EXPAND(lora_expand_large, 256, 2, expand_large<false>)
EXPAND(lora_expand_silu_large, 256, 2, expand_large<true>)
