/*
 * reduce.c: which kernel sets there are, which one this processor gets, and the checked calls of commlib.h.
 *
 * Knows no arithmetic: that is in kernels_*.c, by the rules in reduce.h, in the floating-point mode that is set here.
 * Keeps no state.
 */
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "commlib.h"
#include "reduce.h"

/* Best first. The plain set ends the table and runs everywhere. */
static const cl_kernels *const kernel_sets[] = {
#if defined(__x86_64__)
    &cl_kernels_avx512,
    &cl_kernels_avx2,
#elif defined(__aarch64__)
    &cl_kernels_neon,
#endif
    &cl_kernels_plain,
};

enum { KERNEL_SETS = sizeof kernel_sets / sizeof kernel_sets[0] };

static const size_t dtype_nbytes[CL_DTYPE_END] = {
    [CL_UINT8] = 1,   [CL_INT8] = 1,     [CL_INT16] = 2,   [CL_INT32] = 4,   [CL_INT64] = 8,
    [CL_FLOAT16] = 2, [CL_BFLOAT16] = 2, [CL_FLOAT32] = 4, [CL_FLOAT64] = 8, [CL_BOOL] = 1,
};

static int is_dtype(int32_t dtype)
{
    return dtype >= 0 && dtype < CL_DTYPE_END;
}

size_t cl_dtype_nbytes(int32_t dtype)
{
    return is_dtype(dtype) ? dtype_nbytes[dtype] : 0;
}

const cl_kernels *cl_kernels_best(void)
{
    int index = 0;
    while (!kernel_sets[index]->supported())
        index++;
    return kernel_sets[index];
}

const char *cl_kernels_name(int index)
{
    return index >= 0 && index < KERNEL_SETS ? kernel_sets[index]->name : NULL;
}

int cl_kernels_supported(int index)
{
    return index >= 0 && index < KERNEL_SETS && kernel_sets[index]->supported();
}

/* ---- the floating-point mode ---- */

#if defined(__x86_64__)
enum { ORDINARY_MODE = 0x1f80, SEEN_FLAGS = 0x3f }; /* MXCSR at the start of a program; bits that only record */

static uint64_t read_mode(void)
{
    return _mm_getcsr() & ~(unsigned)SEEN_FLAGS;
}

static void write_mode(uint64_t mode)
{
    _mm_setcsr((unsigned)mode);
}
#elif defined(__aarch64__)
enum { ORDINARY_MODE = 0 }; /* FPCR */

static uint64_t read_mode(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

static void write_mode(uint64_t mode)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
}
#else
enum { ORDINARY_MODE = 0 }; /* no way to ask: taken for ordinary */

static uint64_t read_mode(void)
{
    return ORDINARY_MODE;
}

static void write_mode(uint64_t mode)
{
    (void)mode;
}
#endif

/* Writing is slow next to reading, and nearly never needed. */
uint64_t cl_float_mode_enter(void)
{
    const uint64_t mode = read_mode();
    if (mode != ORDINARY_MODE)
        write_mode(ORDINARY_MODE);
    return mode;
}

void cl_float_mode_restore(uint64_t mode)
{
    if (mode != ORDINARY_MODE)
        write_mode(mode);
}

/* ---- checked calls ---- */

static int reduce_with(const cl_kernels *kernels, int32_t dtype, int32_t reduction, void *acc, const void *in,
                       size_t count)
{
    if (!is_dtype(dtype) || reduction < 0 || reduction >= CL_REDUCTION_END)
        return CL_INVALID;
    const uint64_t mode = cl_float_mode_enter();
    kernels->reduce[dtype][reduction](acc, in, count);
    cl_float_mode_restore(mode);
    return CL_OK;
}

static int scale_with(const cl_kernels *kernels, int32_t dtype, void *out, const void *in, size_t count,
                      double factor)
{
    if (!is_dtype(dtype))
        return CL_INVALID;
    const uint64_t mode = cl_float_mode_enter();
    kernels->scale[dtype](out, in, count, factor);
    cl_float_mode_restore(mode);
    return CL_OK;
}

int cl_reduce(int32_t dtype, int32_t reduction, void *acc, const void *in, size_t count)
{
    return reduce_with(cl_kernels_best(), dtype, reduction, acc, in, count);
}

int cl_scale(int32_t dtype, void *out, const void *in, size_t count, double factor)
{
    return scale_with(cl_kernels_best(), dtype, out, in, count, factor);
}

int cl_reduce_with(int index, int32_t dtype, int32_t reduction, void *acc, const void *in, size_t count)
{
    if (!cl_kernels_supported(index))
        return CL_INVALID;
    return reduce_with(kernel_sets[index], dtype, reduction, acc, in, count);
}

int cl_reduce_both_with(int index, int32_t dtype, int32_t reduction, void *acc, void *in, size_t count)
{
    if (!cl_kernels_supported(index) || !is_dtype(dtype) || reduction < 0 || reduction >= CL_REDUCTION_END)
        return CL_INVALID;
    const uint64_t mode = cl_float_mode_enter();
    kernel_sets[index]->reduce_both[dtype][reduction](acc, in, count);
    cl_float_mode_restore(mode);
    return CL_OK;
}

int cl_scale_with(int index, int32_t dtype, void *out, const void *in, size_t count, double factor)
{
    if (!cl_kernels_supported(index))
        return CL_INVALID;
    return scale_with(kernel_sets[index], dtype, out, in, count, factor);
}
