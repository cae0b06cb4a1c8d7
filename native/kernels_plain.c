/*
 * kernels_plain.c: the kernels in portable scalar C. Runs everywhere, and is the reference for every other set.
 *
 * Written apart from kernels_vector.h on purpose, 16-bit conversions included, so that each checks the other.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "commlib.h"
#include "float16.h"
#include "reduce.h"

#define KERNEL_TARGET
#include "kernels_integer_scale.h"

/* ---- floats as bits ---- */

static double float64_of_bits(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float canonical_float32(float x)
{
    return x == x ? x : float32_of_bits(0x7fc00000u);
}

static double canonical_float64(double x)
{
    return x == x ? x : float64_of_bits(0x7ff8000000000000u);
}

/* ---- order: -0 below +0, NaN wins; every narrower float goes through double unchanged ---- */

static double minimum(double x, double y)
{
    if (x != x || y != y)
        return NAN;
    if (x == y)
        return signbit(x) ? x : y;
    return x < y ? x : y;
}

static double maximum(double x, double y)
{
    if (x != x || y != y)
        return NAN;
    if (x == y)
        return signbit(x) ? y : x;
    return x < y ? y : x;
}

/* ---- loops ---- */

#define REDUCE_TO(name, constness, type, result, also)                               \
    static void name(void *acc, constness void *in, size_t count) {                  \
        unsigned char *to = acc;                                                     \
        constness unsigned char *from = in;                                          \
        for (size_t i = 0; i < count * sizeof(type); i += sizeof(type)) {            \
            type x, y;                                                               \
            memcpy(&x, to + i, sizeof x);                                            \
            memcpy(&y, from + i, sizeof y);                                          \
            x = (type)(result);                                                      \
            memcpy(to + i, &x, sizeof x);                                            \
            also(memcpy(from + i, &x, sizeof x);)                                    \
        }                                                                            \
    }
#define DO(statement) statement
#define LEAVE(statement)
#define MUTABLE
#define REDUCE(name, type, result)                                                   \
    REDUCE_TO(name, const, type, result, LEAVE)                                      \
    REDUCE_TO(name##_both, MUTABLE, type, result, DO)

#define FLOAT_SCALE(name, type, result)                                              \
    static void name(void *out, const void *in, size_t count, double factor) {       \
        unsigned char *to = out;                                                     \
        const unsigned char *from = in;                                              \
        if (factor == 1.0) {                                                         \
            if (to != from && count) memcpy(to, from, count * sizeof(type));         \
            return;                                                                  \
        }                                                                            \
        for (size_t i = 0; i < count * sizeof(type); i += sizeof(type)) {            \
            type x;                                                                  \
            memcpy(&x, from + i, sizeof x);                                          \
            x = (result);                                                            \
            memcpy(to + i, &x, sizeof x);                                            \
        }                                                                            \
    }

/* Sums and products wrap, so they are unsigned whatever the dtype's sign; uint16 would be promoted to a signed int. */
REDUCE(sum_8, uint8_t, x + y)
REDUCE(sum_16, uint16_t, x + y)
REDUCE(sum_32, uint32_t, x + y)
REDUCE(sum_64, uint64_t, x + y)
REDUCE(product_8, uint8_t, x * y)
REDUCE(product_16, uint16_t, (uint32_t)x * y)
REDUCE(product_32, uint32_t, x * y)
REDUCE(product_64, uint64_t, x * y)
REDUCE(min_uint8, uint8_t, y < x ? y : x)
REDUCE(max_uint8, uint8_t, y > x ? y : x)
REDUCE(min_int8, int8_t, y < x ? y : x)
REDUCE(max_int8, int8_t, y > x ? y : x)
REDUCE(min_int16, int16_t, y < x ? y : x)
REDUCE(max_int16, int16_t, y > x ? y : x)
REDUCE(min_int32, int32_t, y < x ? y : x)
REDUCE(max_int32, int32_t, y > x ? y : x)
REDUCE(min_int64, int64_t, y < x ? y : x)
REDUCE(max_int64, int64_t, y > x ? y : x)
REDUCE(or_bool, uint8_t, x != 0 || y != 0)
REDUCE(and_bool, uint8_t, x != 0 && y != 0)

#define FLOAT16_RESULT(x) float16_of_float32((float)(x))
#define BFLOAT16_RESULT(x) bfloat16_of_float32((float)(x))

REDUCE(sum_float16, uint16_t, FLOAT16_RESULT(float32_of_float16(x) + float32_of_float16(y)))
REDUCE(min_float16, uint16_t, FLOAT16_RESULT(minimum(float32_of_float16(x), float32_of_float16(y))))
REDUCE(max_float16, uint16_t, FLOAT16_RESULT(maximum(float32_of_float16(x), float32_of_float16(y))))
REDUCE(product_float16, uint16_t, FLOAT16_RESULT(float32_of_float16(x) * float32_of_float16(y)))
REDUCE(sum_bfloat16, uint16_t, BFLOAT16_RESULT(float32_of_bfloat16(x) + float32_of_bfloat16(y)))
REDUCE(min_bfloat16, uint16_t, BFLOAT16_RESULT(minimum(float32_of_bfloat16(x), float32_of_bfloat16(y))))
REDUCE(max_bfloat16, uint16_t, BFLOAT16_RESULT(maximum(float32_of_bfloat16(x), float32_of_bfloat16(y))))
REDUCE(product_bfloat16, uint16_t, BFLOAT16_RESULT(float32_of_bfloat16(x) * float32_of_bfloat16(y)))
REDUCE(sum_float32, float, canonical_float32(x + y))
REDUCE(min_float32, float, canonical_float32((float)minimum(x, y)))
REDUCE(max_float32, float, canonical_float32((float)maximum(x, y)))
REDUCE(product_float32, float, canonical_float32(x * y))
REDUCE(sum_float64, double, canonical_float64(x + y))
REDUCE(min_float64, double, canonical_float64(minimum(x, y)))
REDUCE(max_float64, double, canonical_float64(maximum(x, y)))
REDUCE(product_float64, double, canonical_float64(x * y))

FLOAT_SCALE(scale_float16, uint16_t, float16_of_float32(float32_of_float16(x) * (float)factor))
FLOAT_SCALE(scale_bfloat16, uint16_t, bfloat16_of_float32(float32_of_bfloat16(x) * (float)factor))
FLOAT_SCALE(scale_float32, float, canonical_float32(x * (float)factor))
FLOAT_SCALE(scale_float64, double, canonical_float64(x * factor))

static int plain_supported(void)
{
    return 1;
}

const cl_kernels cl_kernels_plain = {
    .name = "plain",
    .supported = plain_supported,
#include "kernels_table.h"
};
