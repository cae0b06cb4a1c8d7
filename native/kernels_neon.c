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
#define KERNEL_TARGET
#define half_to_float32(x) ((vector_float32)vcvt_f32_f16((float16x4_t)(x)))
#define float32_to_half(x) ((half_vector_uint16)vcvt_f16_f32((float32x4_t)(x)))
#include "kernels_vector.h"

static int neon_supported(void) {
    return 1;
}

const cl_kernels cl_kernels_neon = {
    .name = "neon",
    .supported = neon_supported,
#include "kernels_table.h"
};
#endif
