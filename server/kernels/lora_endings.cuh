// What `finish` does around a row of a linear besides LoRA: its share of the norm before the linear and of the one
// after it, SiLU, the rotary embedding and the KV cache.

enum Ending { PLAIN, WITH_SILU, WITH_NORM, WITH_ROTARY };

// The norm before: the linear's input was multiplied by the norm's weight but not divided by its root mean square,
// so the outputs are. (What LoRA adds is as linear in that input.)
struct InputNorm {
    const float* squares;  // [num_tokens, num_parts]: each row's sum of squares in parts; null: there is no norm
    int num_parts;
    float inverse_hidden, eps;
};

// The norm after, likewise without its division.
struct OutputNorm {
    const u16* weight;  // [out] bf16
    u16* scaled;        // [num_tokens, out] bf16: y * weight
    float* squares;     // [num_tokens, ceil(out / 64)]: of y, 64 outputs a part
};

struct Rotary {
    const float* tables;        // [num_tables, max_positions, 2, half a head]: cosines, then sines
    const int* positions;       // [num_tokens]
    const int* table_of_token;  // [num_tokens]
    const int* slots;           // [num_tokens]: the row of the caches; below 0: none, and nothing is looked up
    u16 *k_cache, *v_cache;     // [slots, KV heads, head] bf16
    int max_positions, log_half;
};

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// The sum over the 16 lanes that have a token. All lanes of the warp take part.
__device__ __forceinline__ float half_warp_sum(float x) {
#pragma unroll
    for (int offset = 8; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// 1 / root mean square of a lane's two tokens: those at positions 0 and 2 of the tile for the first 16 lanes, 1 and
// 3 for the others. The order of each sum depends on the number of parts alone.
struct RowScales {
    float part[4], scale[2];  // parts of the first token, which is often the only one

    __device__ __forceinline__ void load(const InputNorm& norm, u32 token, bool is_there) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = (threadIdx.x & 15) + 16 * i;
            part[i] = 0.f;
            if (is_there && at < norm.num_parts) part[i] = norm.squares[token * norm.num_parts + at];
        }
    }
    __device__ __forceinline__ float sum(const InputNorm& norm, u32 token, bool is_there) const {
        float sum = part[0];
#pragma unroll
        for (int i = 1; i < 4; ++i) sum += part[i];
        if (is_there)
            for (int at = (threadIdx.x & 15) + 64; at < norm.num_parts; at += 16)
                sum += norm.squares[token * norm.num_parts + at];
        return rsqrtf(half_warp_sum(sum) * norm.inverse_hidden + norm.eps);
    }
    __device__ __forceinline__ void ask(const InputNorm& norm, const u32 (&token)[2], int count) {
        load(norm, token[0], (threadIdx.x >> 4 & 1) < count);
    }
    __device__ __forceinline__ void settle(const InputNorm& norm, const u32 (&token)[2], int count) {
        const int first = threadIdx.x >> 4 & 1;
        scale[0] = sum(norm, token[0], first < count);
        if (count <= 2) return;
        load(norm, token[1], first + 2 < count);
        scale[1] = sum(norm, token[1], first + 2 < count);
    }
};

// Where a lane's two tokens (as above) have their angles and their row of the caches.
struct Places {
    u32 row[2];  // of all tables'
    int slot[2];

    __device__ __forceinline__ void ask(const Rotary& rotary, const u32 (&token)[2], int count) {
        const int first = threadIdx.x >> 4 & 1;
        int position[2], table[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            slot[t] = -1, position[t] = table[t] = 0;
            if (first + 2 * t >= count) continue;
            slot[t] = rotary.slots[token[t]];
            position[t] = rotary.positions[token[t]];
            table[t] = rotary.table_of_token[token[t]];
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) row[t] = slot[t] < 0 ? 0 : table[t] * rotary.max_positions + position[t];
    }
};

// Four pairs' cosines and sines.
struct Angles {
    float4 cos, sin;

    __device__ __forceinline__ void load(const Rotary& rotary, u32 row, int column, bool is_mine) {
        const int half = 1 << rotary.log_half;
        cos = sin = make_float4(0.f, 0.f, 0.f, 0.f);
        if (!is_mine) return;
        // 64 bits: a thousand tables are 4 G elements.
        const float* from =
            rotary.tables + (static_cast<u64>(row) << (rotary.log_half + 1)) + (column & (half - 1));
        cos = *reinterpret_cast<const float4*>(from);
        sin = *reinterpret_cast<const float4*>(from + half);
    }
};

// Attention masks by adding -inf, which NaN and inf would survive: the bounds of `fused._finite`.
__device__ __forceinline__ float bounded(float x) { return x == x ? fminf(fmaxf(x, -32768.f), 32768.f) : 0.f; }

// Four pairs of one token: outputs from `output` on, and those half a head further. They are rounded to bf16 before
// they are turned, as where the linear and the rotary embedding are two ops.
__device__ __forceinline__ void write_rotated(float (&v)[2][4], const Rotary& rotary, const Angles& angles,
                                              int slot, u16* queries, u32 token, int output, int q_end,
                                              int k_end) {
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const u32 pair = to_bf16x2(v[part][i], v[part][i + 1]);
            v[part][i] = low_bf16(pair), v[part][i + 1] = high_bf16(pair);
        }
    if (output < k_end) {
        const float cos[4] = {angles.cos.x, angles.cos.y, angles.cos.z, angles.cos.w};
        const float sin[4] = {angles.sin.x, angles.sin.y, angles.sin.z, angles.sin.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float first = v[0][i], second = v[1][i];
            v[0][i] = first * cos[i] - second * sin[i];
            v[1][i] = second * cos[i] + first * sin[i];
        }
    }
    u16* to = queries + (token * q_end + output);
    if (output >= q_end) {
        if (slot < 0) return;
        const bool is_value = output >= k_end;
        const int kv_width = k_end - q_end, at = output - (is_value ? k_end : q_end);
        to = (is_value ? rotary.v_cache : rotary.k_cache) + (static_cast<long long>(slot) * kv_width + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[0][i] = bounded(v[0][i]), v[1][i] = bounded(v[1][i]);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part)
        *reinterpret_cast<uint2*>(to + (part << rotary.log_half)) =
            make_uint2(to_bf16x2(v[part][0], v[part][1]), to_bf16x2(v[part][2], v[part][3]));
}

// Four outputs of one token, as rounded for y: leaves them times the norm's weight, returns their sum of squares.
__device__ __forceinline__ float write_scaled(uint2 y, uint2 weight, u16* scaled) {
    const u32 words[2] = {y.x, y.y}, weights[2] = {weight.x, weight.y};
    u32 out[2];
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float low = low_bf16(words[i]), high = high_bf16(words[i]);
        out[i] = to_bf16x2(low * low_bf16(weights[i]), high * high_bf16(weights[i]));
        square += low * low;
        square += high * high;
    }
    *reinterpret_cast<uint2*>(scaled) = make_uint2(out[0], out[1]);
    return square;
}
