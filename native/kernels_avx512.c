/*
 * kernels_avx512.c: the kernel set of x86-64 with AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4). Nothing elsewhere.
 */
#include <stddef.h>
#include <stdint.h>

#include "commlib.h"
#include "reduce.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VECTOR_NBYTES 64
#define FLOAT32_REGISTER __m512
#define HALF_REGISTER __m256i
#define KERNEL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

KERNEL_TARGET static inline __m512 half_to_float32(__m256i x)
{
    return _mm512_cvtph_ps(x);
}

KERNEL_TARGET static inline __m256i float32_to_half(__m512 x)
{
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

#include "kernels_vector.h"

/* The builtin asks the operating system too: without its support the registers would not survive a context switch. */
static int avx512_supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const cl_kernels cl_kernels_avx512 = {
    .name = "avx512",
    .supported = avx512_supported,
#include "kernels_table.h"
};
#endif
