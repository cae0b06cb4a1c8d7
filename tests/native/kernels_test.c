/*
 * kernels_test.c: every kernel set that this processor runs gives the bits of the plain set.
 *
 * Self-contained, so that it also runs under an emulator of another architecture. The plain set itself is held to NumPy
 * by tests/test_kernels.py. Usage: kernels_test [SEED]; the seed is printed, and the same seed is the same run.
 */
#include <fenv.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stddef.h>
#include "commlib.h"

enum { LONGEST = 130, MARGIN = 64, BUFFER_NBYTES = LONGEST * 8 + 2 * MARGIN };

/* Zeros, ones, denormals, extremes, infinities and NaNs of both signs and kinds; narrow types take the low bits. */
static const uint64_t special_bits[] = {
    0x0000000000000000, 0x8000000000000000, 0x0000000000000001, 0x8000000000000001, 0x0001000100010001,
    0x3c003c003c003c00, 0x3f8000003f800000, 0x3ff0000000000000, 0x7bff7bff7bff7bff, 0x7c007c007c007c00,
    0xfc00fc00fc00fc00, 0x7c017c017c017c01, 0xfe00fe00fe00fe00, 0x7f7f7f7f7f7f7f7f, 0x7f807f807f807f80,
    0xff80ff80ff80ff80, 0x7f817f817f817f81, 0x7f8000007f800000, 0xff800000ff800000, 0x7f8000017f800001,
    0xffc00000ffc00000, 0x7ff0000000000000, 0xfff0000000000000, 0x7ff0000000000001, 0xfff8000000000000,
    0x7fffffffffffffff, 0xffffffffffffffff, 0x8000800080008000, 0x8000000080000000, 0x0080008000800080,
};

static const double factors[] = {1.0, -1.0, 0.0, -0.0, 0.5, 1.0 / 3, -2.75, 1e-7, 1e300, -1e30};

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Half of the elements are random bits, half are special; the array starts `skew` bytes into the buffer. */
static void fill(unsigned char *buffer, size_t skew, size_t element_nbytes, uint64_t *random)
{
    memset(buffer, 0xa5, BUFFER_NBYTES);
    for (size_t i = skew; i + 8 <= BUFFER_NBYTES; i += element_nbytes) {
        const uint64_t choice = next_random(random);
        const size_t nspecial = sizeof special_bits / sizeof special_bits[0];
        const uint64_t bits = choice & 1 ? next_random(random) : special_bits[(choice >> 1) % nspecial];
        memcpy(buffer + i, &bits, 8);
    }
}

typedef struct {
    unsigned char acc[BUFFER_NBYTES], in[BUFFER_NBYTES], expected[BUFFER_NBYTES];
} buffers;

/* Compares whole buffers: what lies around the array must not change either. */
static int differs(const buffers *b, const char *set, const char *what, int32_t dtype, int32_t which, size_t count)
{
    if (!memcmp(b->acc, b->expected, BUFFER_NBYTES))
        return 0;
    size_t at = 0;
    while (b->acc[at] == b->expected[at])
        at++;
    fprintf(stderr, "%s %s: dtype %" PRId32 ", case %" PRId32 ", %zu elements: byte %zu is %02x, plain has %02x\n", set,
            what, dtype, which, count, at, b->acc[at], b->expected[at]);
    return 1;
}

static int check_reduce(int set, int plain, int32_t dtype, size_t count, size_t skew, uint64_t *random)
{
    int failures = 0;
    buffers b;
    for (int32_t reduction = 0; reduction < CL_REDUCTION_END; reduction++) {
        fill(b.acc, skew, cl_dtype_nbytes(dtype), random);
        fill(b.in, MARGIN - skew, cl_dtype_nbytes(dtype), random);
        memcpy(b.expected, b.acc, BUFFER_NBYTES);
        failures += cl_reduce_with(set, dtype, reduction, b.acc + skew, b.in + MARGIN - skew, count) != CL_OK;
        failures += cl_reduce_with(plain, dtype, reduction, b.expected + skew, b.in + MARGIN - skew, count) != CL_OK;
        failures += differs(&b, cl_kernels_name(set), "reduce", dtype, reduction, count);
    }
    return failures;
}

/* Both places get what the plain set's ordinary form gives to one; its own form of this is held to that, too. */
static int check_reduce_both(int set, int plain, int32_t dtype, size_t count, size_t skew, uint64_t *random)
{
    int failures = 0;
    const size_t nbytes = count * cl_dtype_nbytes(dtype);
    unsigned char before[BUFFER_NBYTES];
    buffers b;
    for (int32_t reduction = 0; reduction < CL_REDUCTION_END; reduction++) {
        fill(b.acc, skew, cl_dtype_nbytes(dtype), random);
        fill(b.in, MARGIN - skew, cl_dtype_nbytes(dtype), random);
        memcpy(b.expected, b.acc, BUFFER_NBYTES);
        memcpy(before, b.in, BUFFER_NBYTES);
        failures += cl_reduce_with(plain, dtype, reduction, b.expected + skew, b.in + MARGIN - skew, count) != CL_OK;
        failures += cl_reduce_both_with(set, dtype, reduction, b.acc + skew, b.in + MARGIN - skew, count) != CL_OK;
        failures += differs(&b, cl_kernels_name(set), "reduce both", dtype, reduction, count);
        memcpy(before + MARGIN - skew, b.acc + skew, nbytes);
        memcpy(b.acc, b.in, BUFFER_NBYTES);
        memcpy(b.expected, before, BUFFER_NBYTES);
        failures += differs(&b, cl_kernels_name(set), "reduce both, second place", dtype, reduction, count);
    }
    return failures;
}

static int check_scale(int set, int plain, int32_t dtype, size_t count, size_t skew, uint64_t *random)
{
    int failures = 0;
    buffers b;
    for (int32_t i = 0; i < (int32_t)(sizeof factors / sizeof factors[0]); i++) {
        fill(b.acc, skew, cl_dtype_nbytes(dtype), random);
        fill(b.in, MARGIN - skew, cl_dtype_nbytes(dtype), random);
        memcpy(b.expected, b.acc, BUFFER_NBYTES);
        const void *in = i % 2 ? b.acc + skew : b.in + MARGIN - skew; /* in place, and not */
        const void *expected_in = i % 2 ? b.expected + skew : b.in + MARGIN - skew;
        failures += cl_scale_with(set, dtype, b.acc + skew, in, count, factors[i]) != CL_OK;
        failures += cl_scale_with(plain, dtype, b.expected + skew, expected_in, count, factors[i]) != CL_OK;
        failures += differs(&b, cl_kernels_name(set), "scale", dtype, i, count);
    }
    return failures;
}

static int check_set(int set, int plain, uint64_t *random)
{
    int failures = 0;
    for (int32_t dtype = 0; dtype < CL_DTYPE_END; dtype++)
        for (size_t count = 0; count <= LONGEST && failures < 20; count++) {
            const size_t skew = count % (MARGIN + 1); /* every alignment, within the margin */
            failures += check_reduce(set, plain, dtype, count, skew, random);
            failures += check_reduce_both(set, plain, dtype, count, skew, random);
            failures += check_scale(set, plain, dtype, count, skew, random);
        }
    return failures;
}

/* A mode that the calling thread has left behind changes no bit, and is still there afterwards. */
static int check_mode(int set)
{
    const float tiny = 0x1p-30f;
    float sum = 1, product = 1;
    fesetround(FE_UPWARD);
    int failures = cl_reduce_with(set, CL_FLOAT32, CL_SUM, &sum, &tiny, 1) != CL_OK;
    failures += cl_scale_with(set, CL_FLOAT32, &product, &product, 1, 1.0 / 3) != CL_OK;
    failures += fegetround() != FE_UPWARD;
    fesetround(FE_TONEAREST);
    failures += sum != 1 || product != (float)(1.0 / 3);
    if (failures)
        fprintf(stderr, "%s: the rounding mode of the caller shows\n", cl_kernels_name(set));
    return failures;
}

int main(int argc, char **argv)
{
    uint64_t random = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    int plain = 0, failures = 0;
    printf("seed %" PRIu64 "\n", random);
    while (cl_kernels_name(plain + 1))
        plain++;
    for (int set = 0; cl_kernels_name(set); set++) {
        if (!cl_kernels_supported(set)) {
            printf("%s not supported by this processor\n", cl_kernels_name(set));
            continue;
        }
        const int failed = check_set(set, plain, &random) + check_mode(set);
        printf("%s %s\n", cl_kernels_name(set), failed ? "FAILED" : "ok");
        failures += failed;
    }
    return failures != 0;
}
