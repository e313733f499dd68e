// What the CUDA kernels share. Python puts this in front of a kernel's own source: NVRTC needs no include path.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Programmatic dependent launch. Everything before `wait_for_producer` may run while the kernel in front in
// the stream still does, so it must not touch what an earlier kernel of the step writes, nor write anything itself.
__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_producer() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// cp.async: 16 bytes from global to shared memory, zeros where not `is_valid`.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy16(u32 to, const void* from, bool is_valid) {
    const int bytes = is_valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}
__device__ __forceinline__ float2 load_shared8(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
    return v;
}
// 16 bytes of global memory, zeros where not `is_valid`; `once`: of what nobody writes meanwhile and this
// multiprocessor reads but once.
#define PREDICATED_LOAD16(NAME, INSTRUCTION)                                                         \
    __device__ __forceinline__ uint4 NAME(const void* from, bool is_valid) {                         \
        uint4 v;                                                                                     \
        asm volatile(                                                                                \
            "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; "     \
            "mov.b32 %3, 0; @p " INSTRUCTION ".v4.u32 {%0,%1,%2,%3}, [%4];}"                         \
            : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)                                         \
            : "l"(from), "r"(static_cast<int>(is_valid)));                                           \
        return v;                                                                                    \
    }
PREDICATED_LOAD16(load16, "ld.global")
PREDICATED_LOAD16(load_once16, "ld.global.nc.L1::no_allocate.L2::128B")
#undef PREDICATED_LOAD16

// A barrier of `THREADS` of the block's threads; number 0 is __syncthreads'.
template <int NUMBER, int THREADS>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// c[16 x 8] += a[16 x 16] b[16 x 8]. Lane 4 * g + q holds c: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1);
// a: pairs from 2q of row g, row g + 8, then from 2q + 8; b: pairs from 2q, from 2q + 8 of column g.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 to_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// Both halves less 136, exactly where they are 128 to 143.
__device__ __forceinline__ u32 minus_136(u32 pair) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0x3f803f80u), "r"(0xc308c308u));
    return result;
}
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Split-K over a matrix of 4-bit weights. It is cut into chunks of TILE_OUT outputs x CHUNK_IN inputs, numbered with the inputs
// running fastest, and dealt to `num_workers` workers in equal runs. A tile's partial sums are in as many slots
// as workers have a part of it, in their order.
constexpr int TILE_OUT = 256;
constexpr int CHUNK_IN = 128;

struct SplitK {
    int chunks_per_tile, num_chunks, num_workers;

    __device__ __forceinline__ int worker_of(int chunk) const {  // ((chunk + 1) * num_workers - 1) / num_chunks
        const int dividend = (chunk + 1) * num_workers - 1;      // the host keeps it below 2**31
        int quotient = static_cast<int>(dividend * reciprocal(num_chunks));  // off by one at most
        const int rest = dividend - quotient * num_chunks;
        quotient += rest >= num_chunks;
        quotient -= rest < 0;
        return quotient;
    }
    __device__ __forceinline__ int first_chunk(int worker) const { return num_chunks * worker / num_workers; }
    __device__ __forceinline__ int num_slots(int tile) const {
        const int chunk = tile * chunks_per_tile;
        return worker_of(chunk + chunks_per_tile - 1) - worker_of(chunk) + 1;
    }
};
