/*
 * kernels_neon.c: the kernel set of aarch64, where NEON is always there. Nothing elsewhere.
 */
#include <stddef.h>
#include <stdint.h>

#include "commlib.h"
#include "reduce.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define VECTOR_NBYTES 16
#define FLOAT32_REGISTER float32x4_t
#define HALF_REGISTER float16x4_t
#define KERNEL_TARGET /* the base instruction set has it */

KERNEL_TARGET static inline float32x4_t half_to_float32(float16x4_t x)
{
    return vcvt_f32_f16(x);
}

KERNEL_TARGET static inline float16x4_t float32_to_half(float32x4_t x)
{
    return vcvt_f16_f32(x);
}

#include "kernels_vector.h"

static int neon_supported(void)
{
    return 1;
}

const cl_kernels cl_kernels_neon = {
    .name = "neon",
    .supported = neon_supported,
#include "kernels_table.h"
};
#endif
