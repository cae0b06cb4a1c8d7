/*
 * reduce.h: a kernel set is one table, dtype x reduction, of the same arithmetic in one instruction set.
 *
 * The rules, the same in every set, so that all sets give the same bits on every processor:
 *   - a NaN that a kernel makes or passes on is always the one canonical quiet NaN (positive, top mantissa bit only):
 *     hardware disagrees on payloads and signs, and bits would otherwise depend on who comes first;
 *   - Min and Max are NaN if either side is NaN, and order -0 below +0;
 *   - denormals are kept; 16-bit floats are widened to fp32, and rounded once per call, to nearest even;
 *   - integers wrap; a bool is any non-zero byte, and a result is 0 or 1;
 *   - scaling an integer goes through fp64, rounds toward zero, saturates at the type's range; NaN gives 0;
 *     a bool is scaled to "true and factor is not 0".
 * They hold in the ordinary floating-point mode. A thread may have left it (torch.set_flush_denormal, fesetround): whoever
 * calls through the table enters it first, once for many calls; the functions of commlib.h do so by themselves.
 * Buffers need no alignment. acc and in, out and in, are the same memory or do not overlap.
 */
#ifndef CL_REDUCE_H
#define CL_REDUCE_H

#include <stddef.h>
#include <stdint.h>

#include "commlib.h"

typedef void (*cl_reduce_kernel)(void *acc, const void *in, size_t count);
typedef void (*cl_reduce_both_kernel)(void *acc, void *in, size_t count);
typedef void (*cl_scale_kernel)(void *out, const void *in, size_t count, double factor);

typedef struct {
    const char *name;
    int (*supported)(void); /* by this processor and its operating system */
    cl_reduce_kernel reduce[CL_DTYPE_END][CL_REDUCTION_END];
    cl_reduce_both_kernel reduce_both[CL_DTYPE_END][CL_REDUCTION_END]; /* what acc gets, `in` gets too */
    cl_scale_kernel scale[CL_DTYPE_END]; /* an exact copy when factor is 1: also of int64 beyond 2^53 and of NaN bits */
} cl_kernels;

/* The best set that this processor runs; a const table, never NULL. Costs a few loads, but is worth keeping. */
const cl_kernels *cl_kernels_best(void);

/* Enters the mode of the rules above: nearest even, denormals kept, no traps. Returns the thread's own mode, to restore. */
uint64_t cl_float_mode_enter(void);
void cl_float_mode_restore(uint64_t mode);

extern const cl_kernels cl_kernels_avx512; /* x86-64 only */
extern const cl_kernels cl_kernels_avx2;   /* x86-64 only */
extern const cl_kernels cl_kernels_neon;   /* aarch64 only */
extern const cl_kernels cl_kernels_plain;

#endif
