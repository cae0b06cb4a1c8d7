/*
 * kernels_avx2.c: the kernel set of x86-64 with AVX2 and F16C (Haswell, Zen and later). Nothing elsewhere.
 */
#include <stddef.h>
#include <stdint.h>

#include "commlib.h"
#include "reduce.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VECTOR_NBYTES 32
#define FLOAT32_REGISTER __m256
#define HALF_REGISTER __m128i
#define KERNEL_TARGET __attribute__((target("avx2,f16c")))

KERNEL_TARGET static inline __m256 half_to_float32(__m128i x)
{
    return _mm256_cvtph_ps(x);
}

KERNEL_TARGET static inline __m128i float32_to_half(__m256 x)
{
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

#include "kernels_vector.h"

/* Every processor with AVX2 has F16C; a hypervisor may hide it, but older compilers have no cheap way to ask. */
static int avx2_supported(void)
{
#if __GNUC__ >= 11
    if (!__builtin_cpu_supports("f16c"))
        return 0;
#endif
    return __builtin_cpu_supports("avx2");
}

const cl_kernels cl_kernels_avx2 = {
    .name = "avx2",
    .supported = avx2_supported,
#include "kernels_table.h"
};
#endif
