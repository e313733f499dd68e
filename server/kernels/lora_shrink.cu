// LoRA for a step whose tokens use different adapters, on tensor cores.
//
// An adapter's rank rows are in pages of eight rows of the banks. The host groups the step's tokens by adapter and
// writes down everything a block has to know in one record (LoraGpuStep), so that its loads start at once. Counts
// are read on the device: a captured graph stays valid when the step changes. No sum depends on which other tokens
// are in the step.

struct ShrinkParams {
    Step step;
    const u16* x;                                      // [num_tokens, in] bf16
    const u16* bank;                                   // [rows, sublinears, in] bf16
    float* h;                                          // [slices, num_tokens, sublinears, max_pages * 8]
    long long x_stride, row_stride, sublinear_stride;  // in elements
    int in_features, slice_in;
};

// h[slice, t, s, j] = sum of x[t, k] * bank[row j of t's adapter, s, k] over the slice's k. One block: one item (up
// to two pages of one adapter and 8 * NT of its tokens), one sublinear, one slice. The eight warps take blocks of
// 64 inputs in turn. The matrix instruction has the 16 bank rows on its m side and 8 tokens on its n side.
//
// Within 32 inputs a lane loads 16 bytes, eight inputs in a row, of its rows of the bank and of x: the order in
// which the instruction meets the inputs is not theirs in memory, but it is the same on both sides.
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
                rows[r] =
                    p.bank + (page * PAGE_ROWS + group) * p.row_stride + sublinear * p.sublinear_stride + begin;
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
