// LoRA's shrink in the launch of the partial sums: the bits of lora_shrink.cu, without a launch of its own.
//
// A unit is eight tokens of an item, one sublinear and one slice of the inputs; a team of eight warps goes through it
// as a block of lora_shrink does. Units are dealt to all teams of the launch in turn, and a team does its own before
// it multiplies. The bank's rows come into registers, a trip of 256 * SHRINK_PIECES inputs at a time: of the first
// trip before the kernel in front has ended, of each later one as soon as the trip before is used up.

struct ShrinkPart {
    Step step;
    const u16* bank;                           // [rows, sublinears, in] bf16
    float* h;                                  // [slices, num_tokens, sublinears, max_pages * 8]
    int row_stride, sublinear_stride;          // in elements
    int slice_in, num_slices, num_sublinears;
    int octets, max_items;                     // an item has up to so many times eight tokens
    float per_item, per_slice, per_sublinear;  // 1 / units of an item, 1 / num_slices, 1 / num_sublinears
};

struct PartialsShrinkParams {
    PartialsParams partials;
    ShrinkPart shrink;
};
static_assert(sizeof(ShrinkPart) == 112, "Python packs these parameters");
static_assert(sizeof(PartialsParams) == PARTIALS_BYTES, "and these");

// In a launch without LoRA.
struct NoShrink {
    static constexpr bool WITH_SPARE = false;
    static constexpr int STAGES_BEFORE = 1 << 30;

    __device__ __forceinline__ void find_first() {}
    __device__ __forceinline__ void load_bank() {}
    __device__ __forceinline__ void load_x() {}
    template <class Feed>
    __device__ __forceinline__ void run(float*) {}
};

template <int WARPS>
struct Shrink {
    static constexpr bool WITH_SPARE = SHRINK_WITH_SPARE;
    static constexpr int STAGES_BEFORE = SHRINK_STAGES_BEFORE;  // of weights that are asked for before the bank
    static constexpr int TEAM = 8, TEAMS = WARPS / TEAM, PIECES = SHRINK_PIECES, TRIP = PIECES / 2 * TEAM * 64;
    static constexpr int SUMS = TEAM * 4 * 32;
    const PartialsParams& linear;
    const ShrinkPart& p;
    int team, warp, lane, unit, num_units, trips, to;
    int4 item;
    const u16* rows[2];  // of the bank, and of x: where the lane reads next
    const u16* token;
    int left[2], left_x;  // inputs from there on; none where there is no row
    uint4 a[PIECES][2], x[PIECES];

    __device__ __forceinline__ Shrink(const PartialsShrinkParams& params)
        : linear(params.partials), p(params.shrink) {
        team = threadIdx.x / (TEAM * 32), warp = threadIdx.x / 32 % TEAM, lane = threadIdx.x & 31;
        unit = blockIdx.x + team * gridDim.x;
    }
    // dividend / divisor where the dividend is below 2**20, as the host makes sure.
    static __device__ __forceinline__ int divide(int dividend, float reciprocal_of_divisor) {
        return static_cast<int>((dividend + 0.5f) * reciprocal_of_divisor);
    }
    __device__ __forceinline__ int units_per_item() const { return p.octets * p.num_sublinears * p.num_slices; }
    __device__ __forceinline__ void find_item() {
        const int index = divide(unit, p.per_item);
        if (index < p.max_items) item = p.step.items[index];
    }
    __device__ __forceinline__ void find_first() {
        find_item();
        num_units = p.step.header[0] * units_per_item();
    }
    // Where the unit's numbers are, and where its results go.
    __device__ __forceinline__ void open_unit() {
        const int part = unit - divide(unit, p.per_item) * units_per_item();
        const int row = divide(part, p.per_slice), slice = part - row * p.num_slices;
        const int octet = divide(row, p.per_sublinear), sublinear = row - octet * p.num_sublinears;
        const int group = lane >> 2, quad = lane & 3, begin = slice * p.slice_in;
        const int count = (item.w & 0xffff) - octet * 8, place = item.w >> 16;
        const int* order = p.step.token_order + item.z + octet * 8;
        const int span = min(p.slice_in, linear.in_features - begin), own = warp * 64 + quad * 8;
        trips = (span + TRIP - 1) / TRIP;
        const u16* bank = p.bank + (static_cast<long long>(sublinear) * p.sublinear_stride + begin + own);
        rows[0] = bank + static_cast<long long>(item.x * PAGE_ROWS + group) * p.row_stride;
        rows[1] = bank + static_cast<long long>(item.y * PAGE_ROWS + group) * p.row_stride;
        left[0] = count > 0 ? span - own : 0;
        left[1] = item.y >= 0 ? left[0] : 0;
        token = linear.x, left_x = 0;
        if (group < count) {
            token += order[group] * static_cast<long long>(static_cast<int>(linear.x_stride)) + begin + own;
            left_x = span - own;
        }
        // The team's warp i < 4 adds up what its warps have in register i.
        const int position = quad * 2 + warp % 2, page = warp / 2;
        to = -1;
        if (page < 2 && position < count && (page == 0 || item.y >= 0))
            to = ((slice * p.step.num_tokens + order[position]) * p.num_sublinears + sublinear) *
                     (p.step.max_pages * PAGE_ROWS) +
                 (place + page) * PAGE_ROWS + group;
    }
    static __device__ __forceinline__ int input(int j) { return j / 2 * (TEAM * 64) + j % 2 * 32; }
    __device__ __forceinline__ void load_bank_of_trip() {
#pragma unroll
        for (int j = 0; j < PIECES; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) a[j][r] = load_once16(rows[r] + input(j), input(j) < left[r]);
    }
    __device__ __forceinline__ void load_x_of_trip() {
#pragma unroll
        for (int j = 0; j < PIECES; ++j) x[j] = load16(token + input(j), input(j) < left_x);
    }
    __device__ __forceinline__ void next_trip() {
        rows[0] += TRIP, rows[1] += TRIP, token += TRIP;
        left[0] -= TRIP, left[1] -= TRIP, left_x -= TRIP;
        --trips;
    }
    // The first trip: the bank's part before the kernel in front has ended, the rest after.
    __device__ __forceinline__ void load_bank() {
        if (unit >= num_units) return;
        open_unit();
        load_bank_of_trip();
    }
    __device__ __forceinline__ void load_x() {
        if (unit < num_units) load_x_of_trip();
    }
    // `scratch` is a stage that is not fed yet; afterwards it is the feed's.
    template <class Feed>
    __device__ __forceinline__ void run(float* scratch) {
        static_assert(TEAMS * 2 * SUMS * 4 <= Feed::STAGE_BYTES, "a stage holds the sums of all teams");
        float* const sums = scratch + team * 2 * SUMS;
        float* mine = sums;
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        while (unit < num_units) {
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
                mma(acc, a[j][0].x, a[j][1].x, a[j][0].y, a[j][1].y, x[j].x, x[j].y);
                mma(acc, a[j][0].z, a[j][1].z, a[j][0].w, a[j][1].w, x[j].z, x[j].w);
            }
            next_trip();
            const bool is_whole = trips == 0;
            const int at = to;
            if (is_whole) {
                unit += TEAMS * gridDim.x;
                if (unit < num_units) {
                    find_item();
                    open_unit();
                }
            }
            if (unit < num_units) {
                load_bank_of_trip();
                load_x_of_trip();
            }
            if (!is_whole) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mine[(warp * 4 + i) * 32 + lane] = acc[i];
                acc[i] = 0.f;
            }
            if (team == 0)
                meet<1, TEAM * 32>();
            else
                meet<2, TEAM * 32>();
            if (at >= 0) {
                float sum = mine[warp * 32 + lane];
#pragma unroll
                for (int w = 1; w < TEAM; ++w) sum += mine[(w * 4 + warp) * 32 + lane];
                p.h[at] = sum;
            }
            mine = mine == sums ? sums + SUMS : sums;  // no warp is two units ahead of another
        }
        Feed::before_release();
        __syncthreads();
    }
};
